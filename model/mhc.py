"""mHC, manifold-constrained hyper-connections: N residual streams mixed by a doubly stochastic matrix (R 2.2).

Orientation: comb_jk carries stream j to stream k, X'_k = sum_j comb_jk X_j, so comb is the transpose of the
report's B. Everything here is an fp32 island except the streams themselves.
"""

from typing import Any

import torch
from torch import Tensor

from model.layers import at_least_fp32


def mixes(
    x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three mixes of one mHC site, each a function of the token's own streams.

    Source: R 2.2, released code (spec 2). Math: mix = (fn x) * rsqrt(mean(x^2) + norm_eps), x the N*D flat streams;
    pre = sigmoid(.) + hc_eps, post = 2 sigmoid(.), comb = sinkhorn(.), each of scale * mix + base.
    Shapes: fn [(2 + N) N, N D] with rows pre, post, comb (row-major jk); base [(2 + N) N]; scale [3].
    Returns pre_BTN, post_BTN, comb_BTNN in at least fp32.
    """
    N = x_BTND.shape[2]
    mix = normalized_product(x_BTND, fn, norm_eps)
    pre, post, comb = mix.split([N, N, N * N], dim=-1)
    base_pre, base_post, base_comb = base.split([N, N, N * N])
    pre_BTN = torch.sigmoid(scale[0] * pre + base_pre) + hc_eps
    post_BTN = 2 * torch.sigmoid(scale[1] * post + base_post)
    logits_BTNN = (scale[2] * comb + base_comb).unflatten(-1, (N, N))
    return pre_BTN, post_BTN, sinkhorn(logits_BTNN, iterations, hc_eps)


def enter(
    x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One site up to its layer: `mixes`, then `collapse` by pre. Returns u_BTD, post_BTN, comb_BTNN."""
    pre, post, comb = mixes(x_BTND, fn, base, scale, iterations=iterations, hc_eps=hc_eps, norm_eps=norm_eps)
    return collapse(x_BTND, pre), post, comb


def normalized_product(x_BTND: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """(fn x) / rms(x) over the flat streams: a weight-less RMSNorm applied after the product. Returns [B, T, rows]."""
    x = at_least_fp32(x_BTND.flatten(2))
    return (x @ fn.T) * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Towards a doubly stochastic matrix: softmax over the last axis, then columns and rows in turn.

    Source: R 2.2 eq. 8, released code. The first of `iterations` rounds is the softmax and one division by the sums
    over the first axis; each other divides by the sums over the last axis, then over the first. eps is added to the
    softmax and to every sum. Shapes: [..., N, N], orientation jk as in `mixes`. The backward pass is by hand: it keeps
    the logits only and goes through the rounds again.
    """
    return _Sinkhorn.apply(logits, iterations, eps)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations, ctx.eps = iterations, eps
        _, results, _ = _rounds(_tokens_last(logits), iterations, eps)
        return _tokens_first(results[-1], logits.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        softmax, results, divisors = _rounds(_tokens_last(logits), ctx.iterations, ctx.eps)
        grad_NNP = _tokens_last(grad)
        # y = x / (sum x + eps): dx = (dy - sum(dy y)) / (sum x + eps).
        for i in range(len(results) - 1, -1, -1):
            mean = (grad_NNP * results[i]).sum(_axis(i), keepdim=True)
            grad_NNP = (grad_NNP - mean).div_(divisors[i])
        grad_NNP = softmax * (grad_NNP - (grad_NNP * softmax).sum(1, keepdim=True))
        return _tokens_first(grad_NNP, logits.shape), None, None


def _rounds(logits_NNP: Tensor, iterations: int, eps: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The softmax (before its eps), and of each division the result and the divisor."""
    softmax = torch.softmax(logits_NNP, dim=1)
    comb, results, divisors = softmax + eps, [], []
    for i in range(2 * iterations - 1):
        divisors.append(comb.sum(_axis(i), keepdim=True).add_(eps))
        comb = comb / divisors[-1]
        results.append(comb)
    return softmax, results, divisors


def _axis(division: int) -> int:
    """Divisions 0, 2, 4, ... are by sums over the first axis j, the others over the last axis k."""
    return division % 2


def _tokens_last(x: Tensor) -> Tensor:
    """[..., N, N] as contiguous [N, N, P]: sums over N then run along the tokens."""
    return x.flatten(0, -3).permute(1, 2, 0).contiguous()


def _tokens_first(x_NNP: Tensor, shape: torch.Size) -> Tensor:
    # Contiguous, because a batched product of small matrices with other strides falls back to a loop over tokens.
    return x_NNP.permute(2, 0, 1).contiguous().view(shape)


def collapse(x_BTND: Tensor, pre_BTN: Tensor) -> Tensor:
    """u = sum_k pre_k X_k: the input of the layer, x_BTD in the streams' type, summed in at least fp32."""
    u_BTD = torch.matmul(pre_BTN.unsqueeze(-2), at_least_fp32(x_BTND)).squeeze(-2)
    return u_BTD.to(x_BTND.dtype)


def expand(x_BTND: Tensor, y_BTD: Tensor, post_BTN: Tensor, comb_BTNN: Tensor) -> Tensor:
    """X'_k = post_k F(u) + sum_j comb_jk X_j, in at least fp32, returned in the streams' type."""
    carried = torch.matmul(comb_BTNN.transpose(-1, -2), at_least_fp32(x_BTND))
    added = post_BTN.unsqueeze(-1) * at_least_fp32(y_BTD).unsqueeze(-2)
    return (carried + added).to(x_BTND.dtype)


def head(x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> Tensor:
    """The last collapse before the final norm: only the `pre` part, with its own fn [N, N D], base [N], scale [1]."""
    mix = normalized_product(x_BTND, fn, norm_eps)
    return collapse(x_BTND, torch.sigmoid(scale * mix + base) + hc_eps)
