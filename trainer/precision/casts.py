"""The casts that stand between products in FP8, plain: what `trainer.precision.kernels` does in one pass each.

All to E4M3 with a scale for 128 numbers along a row of the result. P: tokens; C, F: channels.
"""

from torch import Tensor

from model.experts import clamped_swiglu
from trainer.precision.elements import E4M3_1X128, FLOORS, Format, named
from trainer.precision.formats import Coded, decode, encode

FLOOR = FLOORS["e4m3"]


def cast_rows(x_PC: Tensor, floor: float = FLOOR) -> Coded:
    """Operands of y = x W^T and of dx = dy W: codes [P, C], exponents [P, ceil(C / 128)]."""
    return encode(x_PC, _format(floor))


def cast_columns(x_PC: Tensor, floor: float = FLOOR) -> Coded:
    """Operands of dW = dy^T x, scales along tokens: codes [C, P], exponents [C, ceil(P / 128)]."""
    return encode(x_PC.mT.contiguous(), _format(floor))


def recast_columns(coded: Coded, floor: float = FLOOR) -> Coded:
    """`cast_columns` of what `cast_rows` left. With powers of two as scales it is about as exact as of x itself."""
    return cast_columns(decode(coded, E4M3_1X128), floor)


def swiglu_cast(gate_PF: Tensor, up_PF: Tensor, weight_P: Tensor | None, limit: float, floor: float = FLOOR) -> Coded:
    """`cast_rows` of `model.experts.clamped_swiglu`, which gives gate's type."""
    return cast_rows(clamped_swiglu(gate_PF, up_PF, weight_P, limit), floor)


def _format(floor: float) -> Format:
    return named(E4M3_1X128.name, floor)
