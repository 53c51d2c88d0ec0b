"""MXFP8: operands of products as tensor cores of Blackwell take them, E4M3 codes with E8M0 scales of blocks of 32.

As for Hopper (`operands.py`) both operands of a product have the summed dim last, so that a block is always 1x32, and
what is multiplied across its rows is laid out transposed. Rows and the summed dim are filled up with zeros to whole
blocks; scales to multiples of 128 rows and 4 blocks, in rows, as cuBLAS's tiles of scales need before they are
swizzled (cuBLAS, "1D block scaling factors layout"). An operand's scales are the exponents. Source: OCP Microscaling
Formats 1.0.
"""

from functools import partial

from torch import Tensor

from trainer.precision import casts
from trainer.precision.formats import Coded
from trainer.precision.operands import Groups, Operand, filled
from trainer.precision.recipe import Formats

SIDE = 32
"""Of a block, and what each group's rows are filled up to: a block along tokens has rows of one expert only."""
TILE = (128, 4)
"""Rows and blocks of a tile of scales."""
cast_rows = partial(casts.cast_rows, side=SIDE)
cast_columns = partial(casts.cast_columns, side=SIDE)
recast_columns = partial(casts.recast_columns, side=SIDE)


def rows_of(coded: Coded, groups: Groups) -> list[Operand]:
    """Codes [P, K] as an operand for each group that has rows."""
    spread = Coded(codes=groups.spread(coded.codes), exponents=groups.spread(coded.exponents))
    return [_operand(spread.codes[span], spread.exponents[span]) for span in groups.spans.values()]


def columns_of(turned: Coded, groups: Groups) -> list[Operand]:
    """Codes [C, Q] of blocks along rows, which are in their groups' places, as an operand for each that has rows."""
    return [
        _operand(turned.codes[:, span], turned.exponents[:, span.start // SIDE : span.stop // SIDE])
        for span in groups.spans.values()
    ]


class MxWeight:
    """The operands of a weight [E, F, C]: of y = x W^T, exact, and of dx = dy Q(W), rounded along F."""

    def __init__(self, weight: Tensor, formats: Formats) -> None:
        assert formats.dgrad_weight is not None
        self.weight, self._floor = weight, formats.dgrad_weight.floor
        self.forwards = _stacked(cast_rows(weight, 0.0))
        self._backwards: list[Operand] | None = None

    @property
    def backwards(self) -> list[Operand]:
        """Made when first asked for: an evaluation needs none."""
        if self._backwards is None:
            self._backwards = _stacked(cast_columns(self.weight, self._floor))
        return self._backwards


def _stacked(coded: Coded) -> list[Operand]:
    return [_operand(codes, exponents) for codes, exponents in zip(coded.codes, coded.exponents, strict=True)]


def _operand(codes: Tensor, exponents: Tensor) -> Operand:
    return Operand(codes=filled(codes, SIDE, SIDE).contiguous(), scales=filled(exponents, *TILE).contiguous())
