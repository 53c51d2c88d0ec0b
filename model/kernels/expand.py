"""The way back into the streams at an mHC site: the twin of `model.mhc.expand`. One pass over the streams each way."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.operand import operand

TOKENS, SLICE = 16, 64


@triton.jit
def _forward(
    x_ptr, y_ptr, post_ptr, comb_ptr, out_ptr, tokens,
    D: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    there, k = (token < tokens)[:, None], tl.arange(0, N)[None, :]
    mask = there & (channel < D)[None, :]
    y = tl.load(y_ptr + token[:, None] * D + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    post = tl.load(post_ptr + token[:, None] * N + k, mask=there, other=0.0)
    out = post[:, :, None] * y[:, None, :]
    for j in tl.static_range(N):
        x = tl.load(x_ptr + (token[:, None] * N + j) * D + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        comb = tl.load(comb_ptr + (token[:, None] * N + j) * N + k, mask=there, other=0.0)
        out += comb[:, :, None] * x[:, None, :]
    place = (token[:, None] * N + k)[:, :, None] * D + channel[None, None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask[:, None, :])


@triton.jit
def _backward(
    x_ptr, y_ptr, post_ptr, comb_ptr, grad_ptr, grad_x_ptr, grad_y_ptr, grad_post_ptr, grad_comb_ptr, tokens,
    D: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there, k = (token < tokens)[:, None], tl.arange(0, N)[None, :]
    post = tl.load(post_ptr + token[:, None] * N + k, mask=there, other=0.0)
    grad_post = tl.zeros((TOKENS, N), tl.float32)
    grad_comb = tl.zeros((TOKENS, N, N), tl.float32)
    for first in range(0, D, SLICE):
        channel = first + tl.arange(0, SLICE)
        mask = there & (channel < D)[None, :]
        place = (token[:, None] * N + k)[:, :, None] * D + channel[None, None, :]
        grad = tl.load(grad_ptr + place, mask=mask[:, None, :], other=0.0).to(tl.float32)
        y_place = token[:, None] * D + channel[None, :]
        y = tl.load(y_ptr + y_place, mask=mask, other=0.0).to(tl.float32)
        grad_post += tl.sum(grad * y[:, None, :], 2)
        grad_y = tl.sum(grad * post[:, :, None], 1)
        tl.store(grad_y_ptr + y_place, grad_y.to(grad_y_ptr.dtype.element_ty), mask=mask)
        for j in tl.static_range(N):
            x_place = (token[:, None] * N + j) * D + channel[None, :]
            x = tl.load(x_ptr + x_place, mask=mask, other=0.0).to(tl.float32)
            comb = tl.load(comb_ptr + (token[:, None] * N + j) * N + k, mask=there, other=0.0)
            grad_x = tl.sum(grad * comb[:, :, None], 1)
            tl.store(grad_x_ptr + x_place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
            share = tl.sum(grad * x[:, None, :], 2)
            grad_comb += tl.where(tl.arange(0, N)[None, :, None] == j, share[:, None, :], 0.0)
    tl.store(grad_post_ptr + token[:, None] * N + k, grad_post, mask=there)
    pair = (token[:, None] * N + k)[:, :, None] * N + tl.arange(0, N)[None, None, :]
    tl.store(grad_comb_ptr + pair, grad_comb, mask=there[:, :, None])


def expand(x_BTND: Tensor, y_BTD: Tensor, post_BTN: Tensor, comb_BTNN: Tensor) -> Tensor:
    """`model.mhc.expand`: X'_k = post_k y + sum_j comb_jk X_j, in the streams' type. N must be a power of two."""
    return _Expand.apply(operand(x_BTND), operand(y_BTD), operand(post_BTN), operand(comb_BTNN))


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTND: Tensor, y_BTD: Tensor, post_BTN: Tensor, comb_BTNN: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTND, y_BTD, post_BTN, comb_BTNN)
        N, D = x_BTND.shape[-2:]
        out, tokens = torch.empty_like(x_BTND), x_BTND.numel() // (N * D)
        grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(D, SLICE))
        _forward[grid](x_BTND, y_BTD, post_BTN, comb_BTNN, out, tokens, D, N, TOKENS, SLICE)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        operands = ctx.saved_tensors
        N, D = operands[0].shape[-2:]
        grads, tokens = tuple(torch.empty_like(one) for one in operands), operands[0].numel() // (N * D)
        _backward[(triton.cdiv(tokens, TOKENS),)](*operands, grad.contiguous(), *grads, tokens, D, N, TOKENS, SLICE)
        return grads
