"""The casts that stand between products in FP8, plain: what `trainer.precision.kernels` does in one pass each.

All to E4M3 with a scale for `side` numbers along a row of the result; kernels know 128. P: tokens; C, F: channels.
"""

from torch import Tensor

from model.experts import clamped_swiglu
from trainer.precision.elements import FLOORS, Format, named
from trainer.precision.formats import Coded, decode, encode

FLOOR = FLOORS["e4m3"]
SIDE = 128


def cast_rows(x_PC: Tensor, floor: float = FLOOR, *, side: int = SIDE) -> Coded:
    """Operands of y = x W^T and of dx = dy W: codes [P, C], exponents [P, ceil(C / side)]."""
    return encode(x_PC, _format(floor, side))


def cast_columns(x_PC: Tensor, floor: float = FLOOR, *, side: int = SIDE) -> Coded:
    """Operands of dW = dy^T x, scales along tokens: codes [C, P], exponents [C, ceil(P / side)]."""
    return encode(x_PC.mT.contiguous(), _format(floor, side))


def recast_columns(coded: Coded, floor: float = FLOOR, *, side: int = SIDE) -> Coded:
    """`cast_columns` of what `cast_rows` left. With powers of two as scales it is about as exact as of x itself."""
    return cast_columns(decode(coded, _format(floor, side)), floor, side=side)


def swiglu_cast(gate_PF: Tensor, up_PF: Tensor, weight_P: Tensor | None, limit: float, floor: float = FLOOR) -> Coded:
    """`cast_rows` of `model.experts.clamped_swiglu`, which gives gate's type."""
    return cast_rows(clamped_swiglu(gate_PF, up_PF, weight_P, limit), floor)


def _format(floor: float, side: int) -> Format:
    return named(f"e4m3_1x{side}", floor)
