"""The partial rotary embedding: the twin of `model.rope.rotate`, and the tile functions it shares with the norms."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.operand import operand
from model.rope import Rotation

ELEMENTS = 4096
"""Elements of a tile of whole rows, at least one row."""


@triton.jit
def angles(table_ptr, token, other, C: tl.constexpr, PAIRS: tl.constexpr, BLOCK_C: tl.constexpr):
    """cos or sin of every channel pair of some tokens, [BLOCK_R, BLOCK_C / 2]; `other` where nothing turns."""
    pair = tl.arange(0, BLOCK_C // 2) - (C // 2 - PAIRS)
    turns = (pair >= 0) & (pair < PAIRS)
    return tl.load(table_ptr + token[:, None] * PAIRS + pair[None, :], mask=turns[None, :], other=other)


@triton.jit
def turned(x, cos, sin, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """x [BLOCK_R, BLOCK_C] with each pair of channels (2i, 2i + 1) rotated."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_R, BLOCK_C // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_R, BLOCK_C))


@triton.jit
def _rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,
    sign,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    token = tl.minimum(row, rows - 1) // HEADS
    x = tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    cos = angles(cos_ptr, token, 1.0, C, PAIRS, BLOCK_C)
    sin = angles(sin_ptr, token, 0.0, C, PAIRS, BLOCK_C) * sign
    out = turned(x, cos, sin, BLOCK_R, BLOCK_C)
    tl.store(out_ptr + row[:, None] * C + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def rotate(x: Tensor, turn: Rotation, *, inverse: bool = False) -> Tensor:
    """`model.rope.rotate`: the last R channels of x [B, T, C] or [B, T, H, C], C even, by the position's angles."""
    return _Rotate.apply(operand(x), operand(turn.cos), operand(turn.sin), -1.0 if inverse else 1.0)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.sign = sign
        return _launch(x, cos, sin, sign)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _launch(grad.contiguous(), cos, sin, -ctx.sign), None, None, None


def _launch(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out, C = torch.empty_like(x), x.shape[-1]
    rows, block = x.numel() // C, row_block(C)
    sizes = {"PAIRS": cos.shape[-1], "HEADS": heads(x, cos), "BLOCK_R": block, "BLOCK_C": triton.next_power_of_2(C)}
    _rotate[(triton.cdiv(rows, block),)](x, cos, sin, out, rows, sign, C, **sizes)
    return out


def row_block(C: int) -> int:
    """Rows of a tile that holds whole rows of C channels."""
    return max(1, ELEMENTS // triton.next_power_of_2(C))


def heads(x: Tensor, cos: Tensor) -> int:
    """Rows of x that share a position: H of [B, T, H, C], 1 of [B, T, C]."""
    return x.shape[2] if x.dim() > cos.dim() else 1
