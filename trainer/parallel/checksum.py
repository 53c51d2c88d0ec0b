"""The checksum of a tensor's bits: 64 bits that differ where a bit differs; equal on any device, made where it lies.

The memory is read as 32-bit words w, the last one filled up with zeros, in chunks of CHUNK words:

    checksum = sum over chunks c of outer_c (sum over i of inner_i w_ci)   mod 2^64

with odd multipliers, drawn once and for all. What it sees of a change, for all but a few draws of the multipliers:
within one word every change, for odd factors take nothing of a difference below 2^32 to a multiple of 2^64; within one
chunk all but 1 in 2^32 draws, in general all but 1 in 2^25 (the lowest bit set in a word's difference is at most its
31st, which leaves as much of a multiplier's chance). So swapped words, chunks or tensors are seen like any other
change. Words of 64 bits would be twice as fast and blind to a pair of flipped top bits: 2^63 times any odd number is
2^63.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Words per chunk: widened to 64 bits they stay in a core's cache. Measured on one core: 6.5 GB/s, half at 2^12."""
BLOCK = 1 << 7
"""Chunks that a GPU takes at a time; the products need 64 MiB."""
INNER, OUTER = 1, 2
"""Seeds of the multipliers; they must be the same on all ranks, and are nothing else's."""


class Checksum:
    """Computes checksums, each tensor's on its own device."""

    def __init__(self) -> None:
        self._multipliers: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The checksum of a tensor of any shape and type, int64 without dimensions, on its device; waits for none."""
        words_P = words(tensor)
        if len(words_P) == 0:
            return torch.zeros((), dtype=torch.int64, device=tensor.device)
        inner_P, outer_P = self._for(tensor.device, len(words_P) // CHUNK + 1)
        sums_P = (chunk_sums if tensor.device.type == "cpu" else chunk_sums_in_blocks)(words_P, inner_P)
        return (sums_P * outer_P[: len(sums_P)]).sum()

    def of_all(
        self, tensors: Mapping[str, Tensor], parallel_map: Callable[..., Iterable[Tensor]] = map
    ) -> dict[str, int]:
        """The checksums by name; parallel_map: like `map`, may run several at the same time."""
        found = dict(zip(tensors, parallel_map(self, tensors.values()), strict=True))
        numbers: dict[str, int] = {}
        for device in {checksum.device for checksum in found.values()}:
            there = {name: checksum for name, checksum in found.items() if checksum.device == device}
            numbers |= zip(there, torch.stack(list(there.values())).tolist(), strict=True)
        return {name: numbers[name] for name in tensors}

    def _for(self, device: torch.device, chunks: int) -> tuple[Tensor, Tensor]:
        """The multipliers inside a chunk, and those of at least so many chunks."""
        known = self._multipliers.get(device)
        if known is None or len(known[1]) < chunks:
            known = (_odd(INNER, CHUNK).to(device), _odd(OUTER, max(chunks, CHUNK)).to(device))
            self._multipliers[device] = known
        return known


def words(tensor: Tensor) -> Tensor:
    """The memory of a tensor as int32 [P], without a copy where it has whole words at a border of words."""
    byte_P = tensor.detach().reshape(-1).view(torch.uint8)
    if byte_P.numel() % 4 == 0 and byte_P.storage_offset() % 4 == 0:
        return byte_P.view(torch.int32)
    words_P = torch.zeros(-(-byte_P.numel() // 4), dtype=torch.int32, device=tensor.device)
    words_P.view(torch.uint8)[: byte_P.numel()] = byte_P
    return words_P


def chunk_sums(words_P: Tensor, inner_P: Tensor) -> Tensor:
    """The inner sums, chunk by chunk: on a CPU, whose product of integer vectors goes over them once."""
    return torch.stack([torch.dot(part_P.long(), inner_P[: len(part_P)]) for part_P in words_P.split(CHUNK)])


def chunk_sums_in_blocks(words_P: Tensor, inner_P: Tensor) -> Tensor:
    """The same, many chunks at a time: on a GPU, which has no such product. An empty last chunk adds a zero."""
    border = len(words_P) // CHUNK * CHUNK
    blocks, rest_P = words_P[:border].unflatten(0, (-1, CHUNK)).split(BLOCK), words_P[border:]
    of_rest = (rest_P * inner_P[: len(rest_P)]).sum().reshape(1)
    return torch.cat([*((block * inner_P).sum(-1) for block in blocks), of_rest])


def _odd(seed: int, count: int) -> Tensor:
    """Odd multipliers; a longer draw begins with a shorter one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) | 1
