"""Loss terms: each is a sum over tokens, divided by an integer count over the whole optimizer step.

The count is known before the first backward pass, so a term does not depend on how the step is cut into rows.
Balance and indexer terms arise inside layers; `attach` hands them their gradient there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import CSA_RATIO
from model.layers import at_least_fp32

CHUNK = 1024
"""Tokens whose logits exist at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TermCounts:
    """Denominators. lm, mtp: learned targets. tokens, mtp_tokens: counted tokens of the main and the MTP branch.

    indexer: counted tokens that see at least one CSA block.
    """

    lm: int = 0
    mtp: int = 0
    tokens: int = 0
    mtp_tokens: int = 0
    indexer: int = 0

    def __add__(self, other: "TermCounts") -> "TermCounts":
        return TermCounts(
            lm=self.lm + other.lm,
            mtp=self.mtp + other.mtp,
            tokens=self.tokens + other.tokens,
            mtp_tokens=self.mtp_tokens + other.mtp_tokens,
            indexer=self.indexer + other.indexer,
        )


def count(target_BT: Tensor, document_BT: Tensor, position_BT: Tensor) -> TermCounts:
    """The denominators that these rows add."""
    counted_BT = document_BT >= 0
    return TermCounts(
        lm=int((target_BT >= 0).sum()),
        mtp=int((mtp_target(target_BT, document_BT) >= 0).sum()),
        tokens=int(counted_BT.sum()),
        mtp_tokens=int((mtp_document(document_BT) >= 0).sum()),
        indexer=int((counted_BT & (position_BT >= CSA_RATIO - 1)).sum()),
    )


def mtp_document(document_BT: Tensor) -> Tensor:
    """Documents of the MTP branch, [B, T-1]: a token whose successor is of another document counts as padding."""
    inside = document_BT[:, 1:] == document_BT[:, :-1]
    return document_BT[:, :-1].masked_fill(~inside, -1)


def mtp_target(target_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Targets of the MTP branch, [B, T-1]: token t + 2 of the same document, -1 where there is none."""
    return target_BT[:, 1:].masked_fill(mtp_document(document_BT) < 0, -1)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_PD: Tensor, weight_VD: Tensor, target_P: Tensor) -> Tensor:
        weight = at_least_fp32(weight_VD)
        total = weight.new_zeros(())
        needed = any(ctx.needs_input_grad[:2])
        grad_h, grad_weight = torch.empty_like(h_PD), torch.zeros_like(weight)
        for first in range(0, h_PD.shape[0], CHUNK):
            rows = slice(first, first + CHUNK)
            h, learned = at_least_fp32(h_PD[rows]), (target_P[rows] >= 0).unsqueeze(-1)
            target = target_P[rows].clamp_min(0).unsqueeze(-1)
            log_p_PV = torch.log_softmax(h @ weight.T, dim=-1)
            total = total - log_p_PV.gather(-1, target).masked_fill(~learned, 0).sum()
            if needed:
                grad_PV = log_p_PV.exp_()
                grad_PV.scatter_(-1, target, grad_PV.gather(-1, target) - 1)
                grad_PV.mul_(learned)
                grad_h[rows] = grad_PV @ weight
                grad_weight.addmm_(grad_PV.T, h)
        ctx.save_for_backward(grad_h, grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_h, grad_weight = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), grad_weight * grad.to(grad_weight.dtype), None


def cross_entropy_sum(h_BTD: Tensor, weight_VD: Tensor, target_BT: Tensor) -> Tensor:
    """sum over targets >= 0 of -log softmax(h W^T)[target], in nats, a scalar in at least fp32.

    Logits are an fp32 island and exist for CHUNK tokens at a time; the gradients are made with them in the forward
    pass and only scaled in the backward pass.
    """
    return _CrossEntropySum.apply(h_BTD.flatten(0, 1), weight_VD, target_BT.flatten())


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.term = scale, (term.dtype, term.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.term
        return grad, torch.full((), ctx.scale, dtype=dtype, device=device), None


def attach(x: Tensor, term: Tensor, scale: float) -> Tensor:
    """x itself; in the backward pass `term` receives the gradient `scale`, as if scale * term were added to the loss.

    So terms of layers in the middle need no path to the end of the model, on one process or on many.
    """
    return _Attach.apply(x, term, scale) if scale else x
