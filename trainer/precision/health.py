"""The health of what is rounded: how large, how much is lost to zero, how far off; by kind of tensor and operand."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.optimizer import Optimizer
from trainer.precision.formats import NAN_EXPONENT, Coded, encode, rounded
from trainer.precision.qat import inexact_tiles
from trainer.precision.weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What one rounding did; tensors, so that nothing waits for a GPU. See `Seen`."""

    operand: str
    size: Tensor
    lost: Tensor
    poisoned: Tensor
    amax: Tensor
    error: Tensor
    square: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Of roundings together. size: numbers but zeros, so that what fills groups of rows up does not count; lost: of
    those, rounded to 0; poisoned: blocks without a finite scale; amax: the largest magnitude; error, square: sums of
    squares, of what rounding changed and of what there was.
    """

    size: int
    lost: int
    poisoned: int
    amax: float
    error: float
    square: float


class Watch:
    """Takes notes of roundings while it is on; many threads may. What is computed again in the backward pass is noted
    again.
    """

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
        size=(x != 0).sum(),
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
            size=int(one.size),
            lost=int(one.lost),
            poisoned=int(one.poisoned),
            amax=float(one.amax),
            error=float(one.error),
            square=float(one.square),
        )
        found.setdefault(one.operand, []).append(numbers)
    return found


@torch.no_grad()
def of_weights(optimizer: Optimizer, weights: Weights) -> dict[str, list[Seen]]:
    """By GROUP.weight, what the rounding of the own masters has done, each matrix by itself."""
    found: dict[str, list[Seen]] = {}
    for member, weight, master in optimizer.masters(told=True):
        formats = weights.table[member.parameter.partition("[")[0]].weight
        if formats:
            coded = encode(master, formats[0])
            of = seen([note("weight", master, weight.to(master.dtype), coded)])
            found.setdefault(f"{member.group}.weight", []).extend(of.get("weight", ()))
    return found


@torch.no_grad()
def inexact(optimizer: Optimizer, weights: Weights) -> dict[str, int]:
    """By group, tiles of own FP4 weights that are not exact in FP8."""
    found: dict[str, int] = {}
    for member, _, master in optimizer.masters(told=True):
        formats = weights.table[member.parameter.partition("[")[0]].weight
        if len(formats) == 2:
            tiles = inexact_tiles(rounded(master, formats[0]), formats[1])
            found[member.group] = found.get(member.group, 0) + tiles
    return found


def together(every: Sequence[Seen]) -> Seen:
    """Several as one; sums are rounded once."""
    return Seen(
        size=sum(one.size for one in every),
        lost=sum(one.lost for one in every),
        poisoned=sum(one.poisoned for one in every),
        amax=max(one.amax for one in every),
        error=math.fsum(one.error for one in every),
        square=math.fsum(one.square for one in every),
    )


def measure(kinds: Mapping[str, Sequence[Seen]]) -> dict[str, float]:
    """The metrics precision/* of each kind, such as experts.input."""
    row: dict[str, float] = {}
    for kind in sorted(kinds):
        of = together(kinds[kind])
        row |= {
            f"precision/amax/{kind}": of.amax,
            f"precision/lost_ratio/{kind}": of.lost / of.size,
            f"precision/poisoned_blocks/{kind}": of.poisoned,
            f"precision/error/{kind}": math.sqrt(of.error / of.square),
        }
    return row
