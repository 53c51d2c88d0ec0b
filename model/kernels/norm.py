"""RMSNorm alone and followed by the partial rotation: twins of `model.layers.rms_norm` and `model.rope.norm_rotate`.

A tile holds whole rows; nothing is rounded before the result is stored. The backward pass normalises anew.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.operand import PARTIALS, operand
from model.kernels.rotate import angles, heads, row_block, turned
from model.rope import Rotation


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,
    eps,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    if WEIGHT:
        out = out * tl.load(weight_ptr + channel, mask=channel < C, other=0.0)[None, :]
    if PAIRS:
        token = tl.minimum(row, rows - 1) // HEADS
        cos = angles(cos_ptr, token, 1.0, C, PAIRS, BLOCK_C)
        out = turned(out, cos, angles(sin_ptr, token, 0.0, C, PAIRS, BLOCK_C), BLOCK_R, BLOCK_C)
    tl.store(out_ptr + row[:, None] * C + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    eps,
    programs,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # y = w n, n = x r, r = rsqrt(mean(x^2) + eps): dx = r (w g - n mean(w g n)), dw = sum over rows of g n.
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    grad_weight = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(program * BLOCK_R, rows, programs * BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (row < rows)[:, None] & (channel < C)[None, :]
        place = row[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if PAIRS:
            token = tl.minimum(row, rows - 1) // HEADS
            cos = angles(cos_ptr, token, 1.0, C, PAIRS, BLOCK_C)
            grad = turned(grad, cos, -angles(sin_ptr, token, 0.0, C, PAIRS, BLOCK_C), BLOCK_R, BLOCK_C)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
        normal = x * inverse
        if WEIGHT:
            grad_weight += tl.sum(grad * normal, 0)
            grad = grad * tl.load(weight_ptr + channel, mask=channel < C, other=0.0)[None, :]
        grad_x = inverse * (grad - normal * (tl.sum(grad * normal, 1) / C)[:, None])
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(partial_ptr + program.to(tl.int64) * C + channel, grad_weight, mask=channel < C)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`model.layers.rms_norm`: weight * x / sqrt(mean(x^2) + eps) over the last dim."""
    return _Norm.apply(operand(x), operand(weight), None, None, eps)


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, turn: Rotation) -> Tensor:
    """`model.rope.norm_rotate`: RMSNorm over the last dim, its channels even in number, then the rotation."""
    weight = None if weight is None else operand(weight)
    return _Norm.apply(operand(x), weight, operand(turn.cos), operand(turn.sin), eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        out, rows = torch.empty_like(x), x.numel() // x.shape[-1]
        sizes = _sizes(x, weight, cos)
        _forward[(triton.cdiv(rows, sizes["BLOCK_R"]),)](x, weight, cos, sin, out, rows, eps, **sizes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, cos, sin = ctx.saved_tensors
        rows, sizes = x.numel() // x.shape[-1], _sizes(x, weight, cos)
        programs = triton.cdiv(rows, sizes["BLOCK_R"])
        grad_x, partial = torch.empty_like(x), None
        if weight is not None:
            programs = min(programs, PARTIALS)
            partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
        operands = (x, weight, cos, sin, grad.contiguous(), grad_x, partial, rows, ctx.eps, programs)
        _backward[(programs,)](*operands, **sizes)
        return grad_x, None if partial is None else partial.sum(0).to(weight.dtype), None, None, None


def _sizes(x: Tensor, weight: Tensor | None, cos: Tensor | None) -> dict[str, int]:
    C = x.shape[-1]
    return {
        "C": C,
        "WEIGHT": int(weight is not None),
        "PAIRS": 0 if cos is None else cos.shape[-1],
        "HEADS": 1 if cos is None else heads(x, cos),
        "BLOCK_R": row_block(C),
        "BLOCK_C": triton.next_power_of_2(C),
    }
