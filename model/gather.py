"""Picking rows that are each picked at most once, so that the backward pass is a pick too, not a sum."""

from typing import Any

import torch
from torch import Tensor


def take(x_PD: Tensor, index_Q: Tensor, inverse_P: Tensor) -> Tensor:
    """Rows index_Q of x. inverse_P: where in the result row p went, -1 where it was not picked.

    index_Q may name a row twice only where the result is never used. The backward pass of a plain index is a sum in a
    loop over rows; this one is as fast as the forward pass, and its bits do not depend on an order.
    """
    return _Take.apply(x_PD, index_Q, inverse_P)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, index_Q: Tensor, inverse_P: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_P)
        return x_PD.index_select(0, index_Q)

    @staticmethod
    def backward(ctx: Any, grad_QD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_P,) = ctx.saved_tensors
        if not len(grad_QD):
            return grad_QD.new_zeros(len(inverse_P), *grad_QD.shape[1:]), None, None
        grad_PD = grad_QD.index_select(0, inverse_P.clamp_min(0))
        missing = (inverse_P < 0).view(-1, *[1] * (grad_PD.dim() - 1))
        return grad_PD.masked_fill_(missing, 0), None, None
