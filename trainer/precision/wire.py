"""What travels as codes and scales: weights from their owners, tokens to their experts.

Weights are coded from the masters; who receives them decodes. A byte per number and a scale per block for E4M3, half a
byte for E2M1, where bf16 has two. An FP4 weight is sent as FP4, also where its cast to FP8 is not exact: the receiver
casts as the owner does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.precision.elements import Format, coded_bytes, coded_shapes
from trainer.precision.formats import Coded, decode, encode, pack, rounded, unpack
from trainer.precision.health import Watch
from trainer.precision.weights import Weights


class Wire:
    """Of the parameters that have a format now; all others travel as they are."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def takes(self, parameter: str) -> bool:
        """Whether a parameter travels as codes."""
        return bool(self._weights.table[parameter].weight)

    def size(self, parameter: str, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes of matrices of these shapes."""
        return sum(coded_bytes(shape, self._weights.table[parameter].weight[0]) for shape in shapes)

    def pack(self, parameter: str, masters: Sequence[Tensor]) -> Tensor:
        """The logical matrices of a parameter, from their fp32 masters, as bytes one after the other."""
        format = self._weights.table[parameter].weight[0]
        parts = []
        for master in masters:
            coded = encode(master, format)
            codes = pack(coded.codes) if format.element == "e2m1" else coded.codes
            parts += [codes.flatten(), coded.exponents.flatten()]
        return torch.cat(parts)

    def unpack(self, parameter: str, sent: Tensor, into: Sequence[Tensor]) -> None:
        """Write the weights of `pack`'s bytes, as `Weights.of_master` makes them of the masters."""
        first, *rest = self._weights.table[parameter].weight
        done = 0
        for weight in into:
            codes, exponents = coded_shapes(weight.shape, first)
            of_codes, of_scales = sent[done : done + math.prod(codes)], sent[done + math.prod(codes) :]
            done += math.prod(codes) + math.prod(exponents)
            plain = of_codes.view(codes)
            if first.element == "e2m1":
                plain = unpack(plain, weight.shape[1])
            scales = of_scales[: math.prod(exponents)].view(exponents)
            values = decode(Coded(codes=plain, exponents=scales), first)
            for format in rest:
                values = rounded(values, format)
            weight.copy_(values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """Tokens in a format of blocks within a token, each with its scales: bytes [P, C + ceil(C / block)].

    watch: told of each rounding `times` times, once for each product that would have rounded the token itself.
    """

    format: Format
    watch: Watch
    times: int

    def write(self, x_PD: Tensor) -> Tensor:
        """The bytes of some tokens."""
        coded = encode(x_PD, self.format)
        if self.watch.on:
            values = decode(coded, self.format, x_PD.dtype)
            for _ in range(self.times):
                self.watch.note("input", x_PD, values, coded)
        return torch.cat((coded.codes, coded.exponents), dim=1)

    def read(self, sent: Tensor, like: Tensor) -> Tensor:
        """The tokens of bytes, as wide as `like` and of its type."""
        width = like.shape[1]
        return decode(Coded(codes=sent[:, :width], exponents=sent[:, width:]), self.format, like.dtype)
