"""mHC, manifold-constrained hyper-connections: N residual streams mixed by a doubly stochastic matrix (R 2.2).

Orientation: comb_jk carries stream j to stream k, X'_k = sum_j comb_jk X_j, so comb is the transpose of the
report's B. Everything here is an fp32 island except the streams themselves.
"""

from typing import Any

import torch
from torch import Tensor

from model.layers import at_least_fp32, inverse_rms


def product_and_rms(x_BTND: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """fn x and rsqrt(mean(x^2) + norm_eps), x the N*D flat streams: the mix is one times the other.

    Source: R 2.2, released code (spec 2). Shapes: fn [rows, N D]; the results [B, T, rows] and [B, T, 1], in at least
    fp32.
    """
    x = at_least_fp32(x_BTND.flatten(2))
    return x @ fn.T, inverse_rms(x, norm_eps)


def gates(
    mix: Tensor, base: Tensor, scale: Tensor, N: int, iterations: int, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three mixes of one mHC site, each a function of the token's own streams by mix, see `product_and_rms`.

    Source: R 2.2, released code (spec 2). Math: pre = sigmoid(.) + hc_eps, post = 2 sigmoid(.), comb = sinkhorn(.),
    each of scale * mix + base. Shapes: mix [B, T, (2 + N) N] in the order pre, post, comb (row-major jk);
    base [(2 + N) N]; scale [3]. Returns pre_BTN, post_BTN, comb_BTNN in at least fp32.
    """
    pre, post, comb = mix.split([N, N, N * N], dim=-1)
    base_pre, base_post, base_comb = base.split([N, N, N * N])
    pre_BTN = torch.sigmoid(scale[0] * pre + base_pre) + hc_eps
    post_BTN = 2 * torch.sigmoid(scale[1] * post + base_post)
    logits_BTNN = (scale[2] * comb + base_comb).unflatten(-1, (N, N))
    return pre_BTN, post_BTN, sinkhorn(logits_BTNN, iterations, hc_eps)


def enter(
    x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One site up to its layer: `gates` of the normalised streams, then `collapse` by pre.

    Shapes: fn [(2 + N) N, N D], others as in `gates`. Returns u_BTD, post_BTN, comb_BTNN. The backward pass is by hand:
    it goes over the streams three times and keeps nothing of their size but themselves.
    """
    return _Enter.apply(x_BTND, fn, base, scale, iterations, hc_eps, norm_eps)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, hc_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.sizes = (x_BTND.shape[2], iterations, hc_eps)
        product, rms_inverse = product_and_rms(x_BTND, fn, eps)
        pre_BTN, post_BTN, comb_BTNN = gates(product * rms_inverse, base, scale, *ctx.sizes)
        ctx.save_for_backward(x_BTND, fn, base, scale, product, rms_inverse)
        return collapse(x_BTND, pre_BTN), post_BTN, comb_BTNN

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_post: Tensor, grad_comb: Tensor) -> tuple[Tensor | None, ...]:
        x_BTND, fn, base, scale, product, rms_inverse = ctx.saved_tensors
        x, grad_u = at_least_fp32(x_BTND), at_least_fp32(grad_u)
        inputs = [one.detach().requires_grad_() for one in (product * rms_inverse, base, scale)]
        with torch.enable_grad():
            outputs = gates(*inputs, *ctx.sizes)
        grad_pre = torch.matmul(x, grad_u.unsqueeze(-1)).squeeze(-1)
        grad_mix, grad_base, grad_scale = torch.autograd.grad(outputs, inputs, (grad_pre, grad_post, grad_comb))
        grad_product = grad_mix * rms_inverse
        # The mean of squares: d(1 / rms) = -(1 / rms)^3 x dx / (N D).
        coefficient = -(grad_mix * product).sum(-1, keepdim=True) * rms_inverse**3 / fn.shape[1]
        grad_x = (grad_product @ fn).addcmul_(x.flatten(2), coefficient).view_as(x)
        grad_x.addcmul_(outputs[0].detach().unsqueeze(-1), grad_u.unsqueeze(-2))
        grad_fn = grad_product.flatten(0, 1).T @ x.flatten(2).flatten(0, 1)
        return grad_x.to(x_BTND.dtype), grad_fn, grad_base, grad_scale, None, None, None


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Towards a doubly stochastic matrix: softmax over the last axis, then columns and rows in turn.

    Source: R 2.2 eq. 8, released code. The first of `iterations` rounds is the softmax and one division by the sums
    over the first axis; each other divides by the sums over the last axis, then over the first. eps is added to the
    softmax and to every sum. Shapes: [..., N, N], orientation jk as in `gates`. The backward pass is by hand: it keeps
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
    """X'_k = post_k F(u) + sum_j comb_jk X_j, in at least fp32, returned in the streams' type. Backward by hand."""
    return _Expand.apply(x_BTND, y_BTD, post_BTN, comb_BTNN)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTND: Tensor, y_BTD: Tensor, post_BTN: Tensor, comb_BTNN: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTND, y_BTD, post_BTN, comb_BTNN)
        carried = torch.matmul(comb_BTNN.transpose(-1, -2), at_least_fp32(x_BTND))
        carried.addcmul_(post_BTN.unsqueeze(-1), at_least_fp32(y_BTD).unsqueeze(-2))
        return carried.to(x_BTND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BTND: Tensor) -> tuple[Tensor, ...]:
        x_BTND, y_BTD, post_BTN, comb_BTNN = ctx.saved_tensors
        grad = at_least_fp32(grad_BTND)
        grad_x = torch.matmul(comb_BTNN, grad)
        grad_y = torch.matmul(post_BTN.unsqueeze(-2), grad).squeeze(-2)
        grad_post = torch.matmul(grad, at_least_fp32(y_BTD).unsqueeze(-1)).squeeze(-1)
        grad_comb = torch.matmul(at_least_fp32(x_BTND), grad.transpose(-1, -2))
        return grad_x.to(x_BTND.dtype), grad_y.to(y_BTD.dtype), grad_post, grad_comb


def head(x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> Tensor:
    """The last collapse before the final norm: only the `pre` part, with its own fn [N, N D], base [N], scale [1]."""
    product, rms_inverse = product_and_rms(x_BTND, fn, norm_eps)
    return collapse(x_BTND, torch.sigmoid(scale * (product * rms_inverse) + base) + hc_eps)
