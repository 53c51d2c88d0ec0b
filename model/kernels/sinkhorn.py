"""Tile functions of the Sinkhorn rounds of `model.mhc.sinkhorn`, on tiles [token, j, k] that stay in registers."""

import triton
import triton.language as tl


@triton.jit
def _softmax(logits):
    exponential = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    return exponential / tl.sum(exponential, 2)[:, :, None]


@triton.jit
def sinkhorn(logits, eps, ITERATIONS: tl.constexpr):
    """comb [token, j, k] of logits: softmax over k, then sums over j and over k in turn divided out."""
    comb = _softmax(logits) + eps
    comb = comb / (tl.sum(comb, 1) + eps)[:, None, :]
    for _ in range(1, ITERATIONS):
        comb = comb / (tl.sum(comb, 2) + eps)[:, :, None]
        comb = comb / (tl.sum(comb, 1) + eps)[:, None, :]
    return comb


@triton.jit
def sinkhorn_backward(logits, grad, eps, TOKENS: tl.constexpr, N: tl.constexpr, ITERATIONS: tl.constexpr):
    """The gradient of the logits, of a gradient of comb.

    The rounds are gone through again and their divisors kept: division d, of 2 * ITERATIONS - 1, in slot d of a tile
    [token, N, slot]. On the way back y = x / divisor gives x = y * divisor, and dx = (dy - sum(dy y)) / divisor.
    """
    slots: tl.constexpr = triton.next_power_of_2(2 * ITERATIONS)
    slot = tl.arange(0, slots)[None, None, :]
    softmax = _softmax(logits)
    comb = softmax + eps
    divisor = tl.sum(comb, 1) + eps
    comb = comb / divisor[:, None, :]
    divisors = tl.where(slot == 0, divisor[:, :, None], tl.zeros((TOKENS, N, slots), tl.float32))
    for i in range(1, ITERATIONS):
        divisor = tl.sum(comb, 2) + eps
        comb = comb / divisor[:, :, None]
        divisors = tl.where(slot == 2 * i - 1, divisor[:, :, None], divisors)
        divisor = tl.sum(comb, 1) + eps
        comb = comb / divisor[:, None, :]
        divisors = tl.where(slot == 2 * i, divisor[:, :, None], divisors)
    for back in range(1, ITERATIONS):
        i = ITERATIONS - back
        divisor = tl.sum(tl.where(slot == 2 * i, divisors, 0.0), 2)
        grad = (grad - tl.sum(grad * comb, 1)[:, None, :]) / divisor[:, None, :]
        comb = comb * divisor[:, None, :]
        divisor = tl.sum(tl.where(slot == 2 * i - 1, divisors, 0.0), 2)
        grad = (grad - tl.sum(grad * comb, 2)[:, :, None]) / divisor[:, :, None]
        comb = comb * divisor[:, :, None]
    divisor = tl.sum(tl.where(slot == 0, divisors, 0.0), 2)
    grad = (grad - tl.sum(grad * comb, 1)[:, None, :]) / divisor[:, None, :]
    return softmax * (grad - tl.sum(grad * softmax, 2)[:, :, None])
