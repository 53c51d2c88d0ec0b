"""alpha X X^T + beta D, D symmetric, by a Triton kernel that computes one triangle; for `benchmarks.newton_schulz`."""

import torch
import triton
from torch import Tensor
from triton import language as tl

TILE, STEP = 128, 32
"""Rows of a tile of the result, and columns of X per step."""


@triton.jit
def _triangle(
    x_ptr, d_ptr, out_ptr, R, C, alpha, beta, ADD: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    high, low = tl.program_id(0), tl.program_id(1)
    if low <= high:
        row_I, column_J = high * TILE + tl.arange(0, TILE), low * TILE + tl.arange(0, TILE)
        sum_IJ = tl.zeros([TILE, TILE], tl.float32)
        for first in range(0, C, STEP):
            at_K = first + tl.arange(0, STEP)
            x_IK = tl.load(x_ptr + row_I[:, None] * C + at_K, mask=(row_I < R)[:, None] & (at_K < C), other=0.0)
            x_JK = tl.load(x_ptr + column_J[:, None] * C + at_K, mask=(column_J < R)[:, None] & (at_K < C), other=0.0)
            sum_IJ = tl.dot(x_IK, tl.trans(x_JK), acc=sum_IJ, input_precision="ieee")
        sum_IJ = sum_IJ * alpha
        inside = (row_I < R)[:, None] & (column_J < R)[None, :]
        at_IJ = row_I[:, None] * R + column_J[None, :]
        if ADD:
            sum_IJ += beta * tl.load(d_ptr + at_IJ, mask=inside, other=0.0)
        tl.store(out_ptr + at_IJ, sum_IJ, mask=inside)
        tl.store(out_ptr + column_J[None, :] * R + row_I[:, None], sum_IJ, mask=inside)


def product(x_RC: Tensor, d_RR: Tensor | None, *, alpha: float, beta: float) -> Tensor:
    """alpha X X^T + beta D in fp32, D None for none."""
    R, C = x_RC.shape
    out_RR = torch.empty(R, R, device=x_RC.device)
    tiles = triton.cdiv(R, TILE)
    arguments = (x_RC.contiguous(), x_RC if d_RR is None else d_RR, out_RR, R, C, alpha, beta)
    _triangle[(tiles, tiles)](*arguments, ADD=d_RR is not None, TILE=TILE, STEP=STEP, num_warps=8)
    return out_RR
