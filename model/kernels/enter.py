"""The way into a layer at an mHC site: the twin of `model.mhc.enter`.

Forward, one kernel: fn x and the sum of squares in one pass over the streams, then the maps and their Sinkhorn rounds
in registers, then the collapse, which reads the program's streams again. Backward, two kernels: the gradient of the
collapse, back through the maps; then the gradients of streams and fn. Products are of fp32, without TF32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.operand import operand
from model.kernels.sinkhorn import sinkhorn, sinkhorn_backward

TOKENS = 16
"""Tokens of a tile: the least that a product of tiles takes."""
SLICE = 64
"""Channels of a tile that has all streams, or whose gradients take registers for three."""
WIDTH = 128
"""Channels of a tile of flat streams."""
CHUNK = 512
"""Tokens whose share of fn's gradient one program adds up."""


@triton.jit
def _section(mix, first, TOKENS: tl.constexpr, COUNT: tl.constexpr):
    """Columns first .. first + COUNT of mix [TOKENS, columns]."""
    return tl.gather(mix, tl.broadcast_to((first + tl.arange(0, COUNT))[None, :], (TOKENS, COUNT)), 1)


@triton.jit
def _affine(mix, base_ptr, scale_ptr, SECTION: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """scale * mix + base of a section: 0 pre, 1 post, 2 comb."""
    base = tl.load(base_ptr + SECTION * N + tl.arange(0, COUNT))
    return mix * tl.load(scale_ptr + SECTION) + base[None, :]


@triton.jit
def _forward(
    x_ptr, fn_ptr, base_ptr, scale_ptr, u_ptr, post_ptr, comb_ptr, mix_ptr, inverse_ptr, tokens, hc_eps, norm_eps,
    D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, ITERATIONS: tl.constexpr, TOKENS: tl.constexpr,
    SLICE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there, row, count = token < tokens, tl.arange(0, ROWS), (2 + N) * N
    product = tl.zeros((TOKENS, ROWS), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, N * D, WIDTH):
        flat = first + tl.arange(0, WIDTH)
        mask = there[:, None] & (flat < N * D)[None, :]
        x = tl.load(x_ptr + token[:, None] * (N * D) + flat[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = (flat < N * D)[:, None] & (row < count)[None, :]
        fn = tl.load(fn_ptr + row[None, :] * (N * D) + flat[:, None], mask=mask, other=0.0)
        product = tl.dot(x, fn, product, input_precision="ieee")
        squares += tl.sum(x * x, 1)
    inverse = tl.rsqrt(squares / (N * D) + norm_eps)
    mix = product * inverse[:, None]
    tl.store(inverse_ptr + token, inverse, mask=there)
    tl.store(mix_ptr + token[:, None] * count + row[None, :], mix, mask=there[:, None] & (row < count)[None, :])

    n, pair = tl.arange(0, N), tl.arange(0, N * N)
    pre = tl.sigmoid(_affine(_section(mix, 0, TOKENS, N), base_ptr, scale_ptr, 0, N, N)) + hc_eps
    post = 2 * tl.sigmoid(_affine(_section(mix, N, TOKENS, N), base_ptr, scale_ptr, 1, N, N))
    logits = _affine(_section(mix, 2 * N, TOKENS, N * N), base_ptr, scale_ptr, 2, N, N * N)
    comb = sinkhorn(tl.reshape(logits, (TOKENS, N, N)), hc_eps, ITERATIONS)
    tl.store(post_ptr + token[:, None] * N + n[None, :], post, mask=there[:, None])
    comb = tl.reshape(comb, (TOKENS, N * N))
    tl.store(comb_ptr + token[:, None] * (N * N) + pair[None, :], comb, mask=there[:, None])

    for first in range(0, D, SLICE):
        channel = first + tl.arange(0, SLICE)
        mask = there[:, None] & (channel < D)[None, :]
        place = (token[:, None] * N + n[None, :])[:, :, None] * D + channel[None, None, :]
        x = tl.load(x_ptr + place, mask=mask[:, None, :], other=0.0).to(tl.float32)
        u = tl.sum(x * pre[:, :, None], 1)
        tl.store(u_ptr + token[:, None] * D + channel[None, :], u.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hand_back(
    mix, logit_grad, scale_ptr, inverse, token, there, grad_ptr, base_ptr, scale_part_ptr,
    SECTION: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Of one section: store the gradients of fn x, and this program's share of those of base and scale.

    Returns per token the sum of mix times its gradient, which the common root hands on to the streams.
    """
    column = SECTION * N + tl.arange(0, COUNT)
    logit_grad = tl.where(there[:, None], logit_grad, 0.0)
    mix_grad = logit_grad * tl.load(scale_ptr + SECTION)
    rows: tl.constexpr = (2 + N) * N
    tl.store(grad_ptr + token[:, None] * rows + column[None, :], mix_grad * inverse[:, None], mask=there[:, None])
    tl.store(base_ptr + tl.program_id(0) * rows + column, tl.sum(logit_grad, 0))
    tl.store(scale_part_ptr + tl.program_id(0) * rows + column, tl.sum(logit_grad * mix, 0))
    return tl.sum(mix_grad * mix, 1)


@triton.jit
def _maps_backward(
    x_ptr, mix_ptr, inverse_ptr, base_ptr, scale_ptr, grad_u_ptr, grad_post_ptr, grad_comb_ptr,
    pre_ptr, product_grad_ptr, factor_ptr, base_part_ptr, scale_part_ptr, tokens, hc_eps,
    D: tl.constexpr, N: tl.constexpr, ITERATIONS: tl.constexpr, TOKENS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there, n, pair = token < tokens, tl.arange(0, N), tl.arange(0, N * N)
    grad_pre = tl.zeros((TOKENS, N), tl.float32)
    for first in range(0, D, SLICE):
        channel = first + tl.arange(0, SLICE)
        mask = there[:, None] & (channel < D)[None, :]
        place = (token[:, None] * N + n[None, :])[:, :, None] * D + channel[None, None, :]
        x = tl.load(x_ptr + place, mask=mask[:, None, :], other=0.0).to(tl.float32)
        grad = tl.load(grad_u_ptr + token[:, None] * D + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_pre += tl.sum(x * grad[:, None, :], 2)

    inverse = tl.load(inverse_ptr + token, mask=there, other=0.0)
    mix_ptrs = mix_ptr + token[:, None] * ((2 + N) * N)
    mix = tl.load(mix_ptrs + n[None, :], mask=there[:, None], other=0.0)
    sigmoid = tl.sigmoid(_affine(mix, base_ptr, scale_ptr, 0, N, N))
    tl.store(pre_ptr + token[:, None] * N + n[None, :], sigmoid + hc_eps, mask=there[:, None])
    total = _hand_back(
        mix, grad_pre * sigmoid * (1 - sigmoid), scale_ptr, inverse, token, there,
        product_grad_ptr, base_part_ptr, scale_part_ptr, 0, N, N,
    )  # fmt: skip
    mix = tl.load(mix_ptrs + N + n[None, :], mask=there[:, None], other=0.0)
    sigmoid = tl.sigmoid(_affine(mix, base_ptr, scale_ptr, 1, N, N))
    grad = tl.load(grad_post_ptr + token[:, None] * N + n[None, :], mask=there[:, None], other=0.0)
    total += _hand_back(
        mix, 2 * grad * sigmoid * (1 - sigmoid), scale_ptr, inverse, token, there,
        product_grad_ptr, base_part_ptr, scale_part_ptr, 1, N, N,
    )  # fmt: skip
    mix = tl.load(mix_ptrs + 2 * N + pair[None, :], mask=there[:, None], other=0.0)
    logits = tl.reshape(_affine(mix, base_ptr, scale_ptr, 2, N, N * N), (TOKENS, N, N))
    grad = tl.load(grad_comb_ptr + token[:, None] * (N * N) + pair[None, :], mask=there[:, None], other=0.0)
    grad = sinkhorn_backward(logits, tl.reshape(grad, (TOKENS, N, N)), hc_eps, TOKENS, N, ITERATIONS)
    total += _hand_back(
        mix, tl.reshape(grad, (TOKENS, N * N)), scale_ptr, inverse, token, there,
        product_grad_ptr, base_part_ptr, scale_part_ptr, 2, N, N * N,
    )  # fmt: skip
    # r = rsqrt(mean(x^2) + eps), so d(fn x * r) / dx has - mix r^2 / (N D) * x.
    tl.store(factor_ptr + token, -total * inverse * inverse / (N * D), mask=there)


@triton.jit
def _streams_backward(
    x_ptr, fn_ptr, pre_ptr, grad_u_ptr, product_grad_ptr, factor_ptr, grad_x_ptr, fn_part_ptr, tokens,
    D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    # dx = (gradient of fn x) fn + factor x + pre du. This program: one stream's SLICE channels, CHUNK tokens.
    slices = tl.cdiv(D, SLICE)
    n = tl.program_id(0) // slices
    channel = (tl.program_id(0) % slices) * SLICE + tl.arange(0, SLICE)
    row, count = tl.arange(0, ROWS), (2 + N) * N
    wide = (row < count)[:, None] & (channel < D)[None, :]
    fn_place = row[:, None] * (N * D) + n * D + channel[None, :]
    fn = tl.load(fn_ptr + fn_place, mask=wide, other=0.0)
    fn_grad = tl.zeros((ROWS, SLICE), tl.float32)
    for step in range(0, CHUNK, TOKENS):
        token = tl.program_id(1).to(tl.int64) * CHUNK + step + tl.arange(0, TOKENS)
        there = token < tokens
        mask = there[:, None] & (channel < D)[None, :]
        place = (token[:, None] * N + n) * D + channel[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad_u = tl.load(grad_u_ptr + token[:, None] * D + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_mask = there[:, None] & (row < count)[None, :]
        grad = tl.load(product_grad_ptr + token[:, None] * count + row[None, :], mask=grad_mask, other=0.0)
        factor = tl.load(factor_ptr + token, mask=there, other=0.0)[:, None]
        pre = tl.load(pre_ptr + token * N + n, mask=there, other=0.0)[:, None]
        grad_x = tl.dot(grad, fn, factor * x + pre * grad_u, input_precision="ieee")
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        fn_grad = tl.dot(tl.trans(grad), x, fn_grad, input_precision="ieee")
    part = tl.program_id(1).to(tl.int64) * (count * N * D)
    tl.store(fn_part_ptr + part + fn_place, fn_grad, mask=wide)


def enter(
    x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`model.mhc.enter`: u_BTD, post_BTN, comb_BTNN of one site. N must be a power of two."""
    operands = (operand(x_BTND), operand(fn), operand(base), operand(scale))
    return _Enter.apply(*operands, iterations, hc_eps, norm_eps)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, hc_eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        *BT, N, D = x_BTND.shape
        tokens, rows = x_BTND.numel() // (N * D), (2 + N) * N
        u_BTD = x_BTND.new_empty(*BT, D)
        post, comb, mix = (fn.new_empty(*BT, *shape) for shape in ((N,), (N, N), (rows,)))
        inverse = fn.new_empty(BT)
        _forward[(triton.cdiv(tokens, TOKENS),)](
            x_BTND, fn, base, scale, u_BTD, post, comb, mix, inverse, tokens, hc_eps, norm_eps, D, N, _padded(rows),
            iterations, TOKENS, SLICE, WIDTH,
        )  # fmt: skip
        ctx.save_for_backward(x_BTND, fn, base, scale, mix, inverse)
        ctx.constants = tokens, iterations, hc_eps
        return u_BTD, post, comb

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_post: Tensor, grad_comb: Tensor) -> tuple[Tensor | None, ...]:
        x_BTND, fn, base, scale, mix, inverse = ctx.saved_tensors
        tokens, iterations, hc_eps = ctx.constants
        N, D = x_BTND.shape[-2:]
        rows, programs, chunks = (2 + N) * N, triton.cdiv(tokens, TOKENS), triton.cdiv(tokens, CHUNK)
        grad_u, grad_post, grad_comb = grad_u.contiguous(), grad_post.contiguous(), grad_comb.contiguous()
        pre, product_grad, factor = fn.new_empty(tokens, N), torch.empty_like(mix), torch.empty_like(inverse)
        base_part, scale_part = fn.new_empty(programs, rows), fn.new_empty(programs, rows)
        _maps_backward[(programs,)](
            x_BTND, mix, inverse, base, scale, grad_u, grad_post, grad_comb, pre, product_grad, factor, base_part,
            scale_part, tokens, hc_eps, D, N, iterations, TOKENS, SLICE,
        )  # fmt: skip
        grad_x, fn_part = torch.empty_like(x_BTND), fn.new_empty(chunks, *fn.shape)
        _streams_backward[(N * triton.cdiv(D, SLICE), chunks)](
            x_BTND, fn, pre, grad_u, product_grad, factor, grad_x, fn_part, tokens, D, N, _padded(rows), CHUNK, TOKENS,
            SLICE,
        )  # fmt: skip
        sections = scale_part.sum(0).split([N, N, N * N])
        grad_scale = torch.stack([section.sum() for section in sections])
        return grad_x, fn_part.sum(0), base_part.sum(0), grad_scale, None, None, None


def _padded(rows: int) -> int:
    """Rows of fn as a product of tiles takes them."""
    return max(16, triton.next_power_of_2(rows))
