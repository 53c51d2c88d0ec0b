"""The sum of gradients over rows, the same bits in any order: int64 fixed point with 48 fractional bits.

A leaf is rounded once to a multiple of 2^-48, to nearest even; from there on the sum is exact, so it does not matter
who computed which row, nor in what order they arrive.

How a number becomes an integer without a conversion, which AVX2 has no instruction for: neighbouring fp64 numbers from
16 to 32 lie 2^-48 apart. So 24 + g, for |g| < 8, is g rounded to that unit, and its bits read as an integer are the
bits of 24 plus the wanted integer. The bits of 24 are taken off once, at the end; until then sums wrap around 2^64.
"""

import struct
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.parallel.world import Group

FRACTION_BITS = 48
LIMIT = 2.0**14
"""Largest sum of the leaves' largest elements: below it no element of the sum can overflow."""
CHUNK = 1 << 16
"""Elements converted at a time, so that the intermediate values stay in the cache."""
CENTRE = 1.5 * 2.0 ** (52 - FRACTION_BITS)
"""The middle of the numbers whose spacing is the unit: 24."""
CENTRE_BITS: int = struct.unpack("<q", struct.pack("<d", CENTRE))[0]
REACH = CENTRE / 3
"""Numbers below this size, 8, can be added to CENTRE without leaving them; larger ones are converted."""


class ExactSum:
    """Order-free sums of leaves by name."""

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of the result, fp32 or fp64. Leaves may have any float type."""
        self._dtype = dtype
        self._lock = threading.Lock()
        self._sums = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}
        self._integers = {name: _integers(total) for name, total in self._sums.items()}
        self._largest = dict.fromkeys(shapes, 0.0)
        self._centred = dict.fromkeys(shapes, 0)
        """How many times a sum holds CENTRE_BITS."""
        self._chunk = torch.empty(CHUNK, dtype=torch.float64, device=device)
        self._chunk_integers = _integers(self._chunk)

    def reset(self) -> None:
        """Start a new sum."""
        for name, total in self._sums.items():
            if self._largest[name]:
                total.zero_()
                self._largest[name], self._centred[name] = 0.0, 0

    @torch.no_grad()
    def add(self, name: str, leaf: Tensor) -> None:
        """Add one leaf; threads may call it at the same time.

        Raises FloatingPointError if it is not finite or could not be added even alone. Whether the sum could overflow
        is told by `merge`.
        """
        assert leaf.shape == self._sums[name].shape, (name, leaf.shape, self._sums[name].shape)
        if leaf.numel() == 0:
            return
        lowest, highest = torch.aminmax(leaf)
        largest = max(-float(lowest), float(highest))
        if not largest < torch.inf:
            raise FloatingPointError(f"gradient {name}: expected finite values, found {largest}")
        if largest >= LIMIT:
            raise FloatingPointError(
                f"gradient {name}: expected elements below {LIMIT:g} (exact sums), found {largest:g}"
            )
        if not largest:
            # Nothing is added, and `reset` need not take it back: else ranks that share a sum of zeros only would not
            # know which of them holds CENTRE_BITS how often.
            return
        with self._lock:
            self._add(name, leaf.reshape(-1), largest)

    def _add(self, name: str, leaf_P: Tensor, largest: float) -> None:
        self._largest[name] += largest
        self._centred[name] += largest < REACH
        for part, fixed, fixed_integers in self._chunks(leaf_P.numel()):
            fixed.copy_(leaf_P[part])
            if largest < REACH:
                fixed.add_(CENTRE)
            else:
                # Scaling by a power of two is exact, so the one rounding is round_.
                fixed_integers[:] = _integers(fixed.mul_(2.0**FRACTION_BITS).round_().to(torch.int64))
            self._integers[name][part] += fixed_integers

    def totals(self) -> Mapping[str, Tensor]:
        """The accumulators by name, as they are."""
        return self._sums

    def bounds(self) -> Tensor:
        """What `merge` needs of each process, fp64 [P, 2] by name: the largest elements' sum, and how often centred."""
        rows = [(self._largest[name], self._centred[name]) for name in self._sums]
        return torch.tensor(rows, dtype=torch.float64, device=self._chunk.device).reshape(-1, 2)

    def merge(self, bounds_RP2: Tensor, ranks: Mapping[str, Collection[int]]) -> None:
        """The sums are about to be those of all processes. bounds_RP2: of all data ranks, alike on each.

        ranks: the rows of it whose accumulators are added, where not all. Raises OverflowError, on all processes, if a
        sum could overflow.
        """
        largest_P, centred_P = bounds_RP2[:, :, 0].sum(0).tolist(), bounds_RP2[:, :, 1].sum(0).tolist()
        for number, (name, largest) in enumerate(zip(self._sums, largest_P, strict=True)):
            if largest >= LIMIT:
                raise OverflowError(
                    f"gradient {name} = {largest:g}: expected elements whose sum stays below {LIMIT:g} (exact sums)"
                )
            added = ranks.get(name)
            self._largest[name] = largest
            self._centred[name] = int(centred_P[number] if added is None else bounds_RP2[list(added), number, 1].sum())

    def join(self, name: str, group: "Group") -> None:
        """One sum becomes that of all ranks of the group, which call this alike."""
        mine = torch.tensor([self._largest[name], self._centred[name]], dtype=torch.float64, device=self._chunk.device)
        largest, centred = group.gather_rows(mine).sum(0).tolist()
        if largest:
            group.add(self._sums[name])
        self._largest[name], self._centred[name] = largest, int(centred)

    def is_touched(self, name: str) -> bool:
        """False where every leaf so far was zero, or there was none."""
        return self._largest[name] > 0

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The sums so far, rounded to the result's type; those of 32 and more by way of fp64."""
        with self._lock:
            return {name: self.read(name, slice(None)) for name in self._sums}

    def read(self, name: str, rows: slice) -> Tensor:
        """Rows of one sum, rounded to the result's type."""
        total = self._sums[name][rows]
        result = torch.zeros_like(total, dtype=self._dtype)
        if not self._largest[name]:
            return result
        near = self._largest[name] < REACH
        offset = _wrapped((near - self._centred[name]) * CENTRE_BITS)
        integers = _integers(total)
        for part, fixed, fixed_integers in self._chunks(total.numel()):
            fixed_integers[:] = integers[part]
            fixed_integers += offset
            if near:
                fixed.sub_(CENTRE)
            else:
                fixed.copy_(fixed.view(torch.int64).clone()).mul_(2.0**-FRACTION_BITS)
            result.view(-1)[part] = fixed
        return result

    def _chunks(self, size: int) -> Iterator[tuple[slice, Tensor, Any]]:
        """Parts of a flat tensor of `size` elements, each with fp64 memory of its size, and that memory as integers."""
        for start in range(0, size, CHUNK):
            length = min(CHUNK, size - start)
            yield slice(start, start + length), self._chunk[:length], self._chunk_integers[:length]


def _integers(tensor: Tensor) -> Any:
    """A tensor's memory as a flat int64 tensor, on a CPU a numpy array: torch's sum also multiplies by `alpha` = 1."""
    flat = tensor.view(-1).view(torch.int64)
    return flat.numpy() if flat.device.type == "cpu" else flat


def _wrapped(integer: int) -> int:
    """The int64 with the lowest 64 bits of an integer."""
    return (integer + 2**63) % 2**64 - 2**63
