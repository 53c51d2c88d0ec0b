"""Operands of block-scaled products as tensor cores of Hopper take them: E4M3 codes, fp32 scales, both in one layout.

Both operands of a product have the summed dim last ("TN", the only layout of Hopper's FP8), so that what is
multiplied across its rows is laid out transposed. torch and cuBLASLt ask for multiples of 16 in both dims; here the
summed one is filled up to whole blocks of 128, and the other to 16. Zeros add nothing. Scales of blocks 1x128 lie as
[K / 128, rows], those of blocks 128x128 as [rows / 128, K / 128 filled up to a multiple of 4] (cuBLAS, "scaling
factors layouts").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.precision import formats
from trainer.precision.elements import E4M3_OF_FP4, Format
from trainer.precision.formats import Coded

SIDE = 128
"""Of a block, and what expert's rows are filled up to: a block along tokens has rows of one expert only."""
OUTER = 16
QUAD = 4
"""Scales of blocks 128x128 lie in rows of a multiple of so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """codes: uint8 [rows, K]; scales: fp32, contiguous, see above; tall: blocks of 128x128, not of 1x128.

    Of MXFP8 (`mx.py`) scales are uint8.
    """

    codes: Tensor
    scales: Tensor
    tall: bool = False


class Groups:
    """Rows that belong together, counts[e] of them each, with zeros after each group up to a multiple of `side`.

    spans: where each group lies, of those that have rows.
    """

    def __init__(self, counts: Sequence[int], side: int = SIDE) -> None:
        self.counts = list(counts)
        self.sizes = [_up(count, side) for count in counts]
        ends = list(accumulate(self.sizes))
        self.spans = {
            group: slice(end - size, end)
            for group, (end, size) in enumerate(zip(ends, self.sizes, strict=True))
            if size
        }
        self._places: Tensor | None = None

    def spread(self, x: Tensor) -> Tensor:
        """Rows [P, ...] to their places [Q, ...]; x itself where nothing is filled up."""
        if self.sizes == self.counts:
            return x
        if self._places is None:
            self._places = self._placed().to(x.device, non_blocking=True)
        return x.new_zeros(sum(self.sizes), *x.shape[1:]).index_copy_(0, self._places, x)

    def gather(self, parts: Sequence[Tensor], columns: int, like: Tensor) -> Tensor:
        """The rows [P, columns] of results of groups with rows, each filled up in rows and perhaps in columns."""
        if not parts:
            return like.new_empty(0, columns)
        counts = [self.counts[group] for group in self.spans]
        kept = [part[:count, :columns] for part, count in zip(parts, counts, strict=True)]
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def _placed(self) -> Tensor:
        """Where each row lies."""
        before = [0, *accumulate(size - count for size, count in zip(self.sizes, self.counts, strict=True))]
        shift = torch.tensor(before[:-1]).repeat_interleave(torch.tensor(self.counts))
        return torch.arange(len(shift)) + shift


def rows_of(coded: Coded, groups: Groups) -> list[Operand]:
    """Codes [P, K] of blocks 1x128 as an operand for each group that has rows."""
    codes = filled(groups.spread(coded.codes), 1, SIDE)
    scales = _scales(groups.spread(coded.exponents).mT.contiguous())
    # clone, not contiguous: of a single block in K, the latter leaves the strides of the whole.
    return [
        Operand(codes=codes[span], scales=scales[:, span].clone(memory_format=torch.contiguous_format))
        for span in groups.spans.values()
    ]


def columns_of(turned: Coded, groups: Groups) -> list[Operand]:
    """Codes [C, Q] of blocks 1x128 along tokens, which lie in their groups' places, as an operand for each group that
    has some: of dW = dy^T x.
    """
    codes = filled(turned.codes, OUTER, 1)
    scales = _scales(filled(turned.exponents, OUTER, 1).mT.contiguous())
    return [
        Operand(codes=codes[:, span], scales=scales[span.start // SIDE : span.stop // SIDE])
        for span in groups.spans.values()
    ]


def stacked(coded: Coded) -> list[Operand]:
    """Codes [E, rows, K] of blocks 128x128 as an operand for each."""
    codes = filled(coded.codes, OUTER, SIDE)
    scales = _scales(F.pad(coded.exponents, (0, -coded.exponents.shape[-1] % QUAD)))
    return [Operand(codes=one, scales=scale, tall=True) for one, scale in zip(codes, scales, strict=True)]


def across(coded: Coded) -> Coded:
    """Codes of blocks 128x128 of the transposed matrices."""
    return Coded(codes=coded.codes.mT.contiguous(), exponents=coded.exponents.mT.contiguous())


def filled(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Codes with zeros up to multiples of these; themselves where they are."""
    below, beside = -codes.shape[-2] % rows, -codes.shape[-1] % columns
    return F.pad(codes, (0, beside, 0, below)) if below or beside else codes


class Kept:
    """The codes of weights that hold their format's numbers, made once for each version of a weight.

    So whoever writes a weight must change its version: dist.broadcast does not (`increment_version` does), and what
    views a weight must share its version, as `detach()` does and `.data` does not.
    """

    def __init__(self, make: "Callable[[Tensor], WeightOperands]") -> None:
        self._make = make
        self._made: dict[tuple[int, torch.Size], tuple[int, WeightOperands]] = {}

    def of(self, weight: Tensor) -> "WeightOperands":
        """The codes of weight [E, rows, columns] as it is now."""
        key, version = (weight.data_ptr(), weight.shape), weight._version
        found = self._made.get(key)
        if found is None or found[0] != version:
            found = version, self._make(weight.detach())
            self._made[key] = found
        return found[1]


class WeightOperands(Protocol):
    """The operands of a weight, one of each matrix: of y = x W^T and of dx = dy W."""

    weight: Tensor
    forwards: list[Operand]

    @property
    def backwards(self) -> list[Operand]:
        """Made when first asked for: an evaluation needs none."""
        ...


class WeightCodes:
    """The operands of a weight: of y = x W^T and of dx = dy W. The values are exact: no floor, see `weights.py`."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # so that its address is nobody else's while this is kept
        self._coded = formats.encode(weight, E4M3_OF_FP4)
        self.forwards = stacked(self._coded)
        self._backwards: list[Operand] | None = None

    @property
    def backwards(self) -> list[Operand]:
        """Made when first asked for: an evaluation needs none."""
        if self._backwards is None:
            self._backwards = stacked(across(self._coded))
        return self._backwards


def fits(format: Format | None, element: str, block: tuple[int, int]) -> bool:
    """Whether a format is this one, whatever its floor."""
    return format is not None and (format.element, format.block) == (element, block)


def _scales(exponents: Tensor) -> Tensor:
    """fp32 numbers of E8M0; NaN for its NaN, so that a result that a lost block takes part in is NaN."""
    table = _numbers(exponents.device)
    return table.index_select(0, exponents.flatten().int()).view(exponents.shape)


@cache
def _numbers(device: torch.device) -> Tensor:
    return formats.scales(torch.arange(256, dtype=torch.uint8)).to(device)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
