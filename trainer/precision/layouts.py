"""Which operands a kind of tensor core takes: Hopper's blocks of 128 with fp32 scales, Blackwell's of 32 with E8M0."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from trainer.precision import mx, operands
from trainer.precision.formats import Coded
from trainer.precision.operands import Groups, Operand, WeightCodes, WeightOperands, fits
from trainer.precision.recipe import Formats


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """blocks: of each operand's E4M3 format, None for an operand that is what another left.

    side: what the rows of each group are filled up to. rows, columns, weight: operands of codes that lie along the
    summed dim, of codes along tokens, of a weight. casts: who makes codes.
    """

    blocks: Mapping[str, tuple[int, int] | None]
    side: int
    rows: Callable[[Coded, Groups], Sequence[Operand]]
    columns: Callable[[Coded, Groups], Sequence[Operand]]
    weight: Callable[[Tensor, Formats], WeightOperands]
    casts: Callable[[], ModuleType]

    def refusal(self, formats: Formats) -> str:
        """Which format of these its products do not take; "" if they take them."""
        last = formats.weight[-1] if formats.weight else None
        for key, block in self.blocks.items():
            format = last if key == "weight" else getattr(formats, key)
            if block is None and format is not None:
                return f"{key} is {format.name}, not what weight left"
            if block is not None and not fits(format, "e4m3", block):
                expected = f"e4m3_{block[0]}x{block[1]}"
                return f"{key} is {format.name if format else 'in the type of the run'}, not {expected}"
        return ""


@cache
def casts() -> ModuleType:
    """Who makes codes of Hopper's blocks: kernels, or the plain functions, whose bits are the same."""
    by_kernels = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    return importlib.import_module(f"trainer.precision.{'kernels' if by_kernels else 'casts'}")


HOPPER = Layout(
    blocks={
        "weight": (128, 128),
        "input": (1, 128),
        "grad": (1, 128),
        "wgrad_input": (128, 1),
        "wgrad_grad": (128, 1),
        "dgrad_weight": None,
    },
    side=operands.SIDE,
    rows=operands.rows_of,
    columns=operands.columns_of,
    weight=lambda weight, formats: WeightCodes(weight),
    casts=lambda: casts(),
)
BLACKWELL = Layout(
    blocks={
        "weight": (1, 32),
        "input": (1, 32),
        "grad": (1, 32),
        "wgrad_input": (32, 1),
        "wgrad_grad": (32, 1),
        "dgrad_weight": (32, 1),
    },
    side=mx.SIDE,
    rows=mx.rows_of,
    columns=mx.columns_of,
    weight=mx.MxWeight,
    casts=lambda: mx,
)


def of(formats: Formats) -> Layout:
    """Whose products take these formats; Hopper's where none do, which then says why."""
    return HOPPER if BLACKWELL.refusal(formats) else BLACKWELL
