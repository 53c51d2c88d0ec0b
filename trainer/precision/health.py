"""The health of what is rounded: how large, how much is lost to zero, how far off; by kind of tensor and operand."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.precision.formats import NAN_EXPONENT, Coded


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What one rounding did; tensors, so that nothing waits for a GPU. See `Seen`."""

    operand: str
    size: int
    lost: Tensor
    poisoned: Tensor
    amax: Tensor
    error: Tensor
    square: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Of roundings together. size: numbers; lost: of those, not 0 and rounded to 0; poisoned: blocks without a finite
    scale; amax: the largest magnitude; error, square: sums of squares, of what rounding changed and of what there was.
    """

    size: int
    lost: int
    poisoned: int
    amax: float
    error: float
    square: float


class Watch:
    """Takes notes of roundings while it is on; many threads may."""

    def __init__(self) -> None:
        self.on = False
        self.notes: list[Note] = []

    @torch.no_grad()
    def note(self, operand: str, x: Tensor, values: Tensor, coded: Coded) -> None:
        """x was rounded to values."""
        self.notes.append(note(operand, x, values, coded))


def note(operand: str, x: Tensor, values: Tensor, coded: Coded) -> Note:
    """What the rounding of x to values has done."""
    exact, near = x.double(), values.double()
    return Note(
        operand=operand,
        size=x.numel(),
        lost=((x != 0) & (values == 0)).sum(),
        poisoned=(coded.exponents == NAN_EXPONENT).sum(),
        amax=x.abs().amax() if x.numel() else x.new_zeros(()),
        error=(exact - near).square().sum(),
        square=exact.square().sum(),
    )


def seen(notes: Iterable[Note]) -> dict[str, list[Seen]]:
    """The notes in numbers, by operand; not those of what had been rounded before, as tokens that came as codes."""
    found: dict[str, list[Seen]] = {}
    for one in (one for one in notes if one.error or one.poisoned):
        numbers = Seen(
            size=one.size,
            lost=int(one.lost),
            poisoned=int(one.poisoned),
            amax=float(one.amax),
            error=float(one.error),
            square=float(one.square),
        )
        found.setdefault(one.operand, []).append(numbers)
    return found


def measure(kinds: Mapping[str, Sequence[Seen]]) -> dict[str, float]:
    """The metrics precision/* of each kind, such as experts.input; sums are rounded once."""
    row: dict[str, float] = {}
    for kind, every in sorted(kinds.items()):
        square, size = math.fsum(one.square for one in every), sum(one.size for one in every)
        row |= {
            f"precision/amax/{kind}": max(one.amax for one in every),
            f"precision/lost_ratio/{kind}": sum(one.lost for one in every) / size if size else 0.0,
            f"precision/poisoned_blocks/{kind}": sum(one.poisoned for one in every),
            f"precision/error/{kind}": math.sqrt(math.fsum(one.error for one in every) / square) if square else 0.0,
        }
    return row
