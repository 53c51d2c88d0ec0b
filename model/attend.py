"""Softmax with sink over a token's window and its visible compressed entries (R eq. 27), in query chunks.

Keys and values are the same vectors, shared by all heads. Nothing of size T x T or T x S outlives its chunk: the
backward pass, written by hand, computes the probabilities of each chunk again. So memory grows linearly with T.
"""

from typing import Any

import torch
from torch import Tensor

from model.layers import at_least_fp32
from model.sight import Chunk, Sight


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHC: Tensor,
        kv_BTC: Tensor,
        entry_BSC: Tensor,
        sink_H: Tensor,
        sight: Sight,
    ) -> tuple[Tensor, Tensor]:
        out, lse = [], []
        for chunk in sight.chunks():
            _, key_BKC, score_BQHK = _chunk_scores(q_BTHC, kv_BTC, entry_BSC, chunk)
            o_BQHC, lse_BQH = _weigh(score_BQHK, key_BKC, sink_H)
            out.append(o_BQHC.to(q_BTHC.dtype))
            lse.append(lse_BQH)
        o_BTHC, lse_BTH = torch.cat(out, dim=1), torch.cat(lse, dim=1)
        ctx.save_for_backward(q_BTHC, kv_BTC, entry_BSC, sink_H, o_BTHC, lse_BTH)
        ctx.sight = sight
        ctx.mark_non_differentiable(lse_BTH)
        return o_BTHC, lse_BTH

    @staticmethod
    def backward(ctx: Any, grad_BTHC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHC, kv_BTC, entry_BSC, sink_H, o_BTHC, lse_BTH = ctx.saved_tensors
        grad_q = torch.empty_like(q_BTHC)
        grad_kv = torch.zeros_like(at_least_fp32(kv_BTC))
        grad_entry = torch.zeros_like(at_least_fp32(entry_BSC))
        # sum_j p_j dp_j of the softmax's backward pass is the product of the output and its gradient.
        mean_BTH = (at_least_fp32(grad_BTHC) * at_least_fp32(o_BTHC)).sum(-1)
        for chunk in ctx.sight.chunks():
            q_BQHC, key_BKC, score_BQHK = _chunk_scores(q_BTHC, kv_BTC, entry_BSC, chunk)
            p = score_BQHK.sub_(lse_BTH[:, chunk.rows].unsqueeze(-1)).exp_().flatten(1, 2)
            grad_out = at_least_fp32(grad_BTHC[:, chunk.rows]).flatten(1, 2)
            mean = mean_BTH[:, chunk.rows].flatten(1, 2).unsqueeze(-1)
            grad_score = (grad_out @ key_BKC.transpose(1, 2)).sub_(mean).mul_(p)
            grad_q[:, chunk.rows] = (grad_score @ key_BKC).view_as(q_BQHC) * q_BTHC.shape[-1] ** -0.5
            grad_key = grad_score.transpose(1, 2) @ q_BQHC.flatten(1, 2) + p.transpose(1, 2) @ grad_out
            window = chunk.last - chunk.window_first
            grad_kv[:, chunk.window_first : chunk.last] += grad_key[:, :window]
            grad_entry[:, : chunk.entries] += grad_key[:, window:]
        grad_sink = -(torch.exp(at_least_fp32(sink_H) - lse_BTH) * mean_BTH).sum((0, 1))
        return grad_q, grad_kv.to(kv_BTC.dtype), grad_entry.to(entry_BSC.dtype), grad_sink.to(sink_H.dtype), None


def _chunk_scores(q_BTHC: Tensor, kv_BTC: Tensor, entry_BSC: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """`_scores` of the chunk's queries with its keys: window, then entries."""
    key_BKC = torch.cat((kv_BTC[:, chunk.window_first : chunk.last], entry_BSC[:, : chunk.entries]), dim=1)
    visible = chunk.visible_window()
    if chunk.entries:
        visible = torch.cat((visible, chunk.visible_entries()), dim=-1)
    return _scores(q_BTHC[:, chunk.rows], key_BKC, visible)


def _scores(q_BQHC: Tensor, key_BKC: Tensor, visible_BQK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q / sqrt(C), k, and their products, -inf where invisible: [B, Q, H, K]; all in at least fp32."""
    q_BQHC, key_BKC = at_least_fp32(q_BQHC) * q_BQHC.shape[-1] ** -0.5, at_least_fp32(key_BKC)
    score_BQHK = (q_BQHC.flatten(1, 2) @ key_BKC.transpose(1, 2)).unflatten(1, q_BQHC.shape[1:3])
    return q_BQHC, key_BKC, score_BQHK.masked_fill_(~visible_BQK.unsqueeze(2), -torch.inf)


def _weigh(score_BQHK: Tensor, key_BKC: Tensor, sink_H: Tensor) -> tuple[Tensor, Tensor]:
    """o_BQHC and log of the denominator lse_BQH; the scores are overwritten."""
    sink_H1 = at_least_fp32(sink_H).unsqueeze(-1)
    max_BQH1 = torch.maximum(score_BQHK.amax(-1, keepdim=True), sink_H1)
    exp_BQHK = score_BQHK.sub_(max_BQH1).exp_()
    total_BQH1 = exp_BQHK.sum(-1, keepdim=True) + torch.exp(sink_H1 - max_BQH1)
    value_BQHC = (exp_BQHK.flatten(1, 2) @ key_BKC).unflatten(1, exp_BQHK.shape[1:3])
    return value_BQHC / total_BQH1, (max_BQH1 + total_BQH1.log()).squeeze(-1)


def attend(
    q_BTHC: Tensor, kv_BTC: Tensor, entry_BSC: Tensor | None, sink_H: Tensor, sight: Sight
) -> tuple[Tensor, Tensor]:
    """o_h = sum_j exp(z_hj) k_j / (sum_j exp(z_hj) + exp(sink_h)), z_hj = q_h . k_j / sqrt(C).

    Source: R eq. 27 (spec 3.1). j runs over the visible window tokens kv_BTC and compressed entries entry_BSC.
    Returns o_BTHC in q's type and, without gradient, the log of the denominator lse_BTH in at least fp32.
    """
    if entry_BSC is None:
        entry_BSC = kv_BTC[:, :0]
    return _Attend.apply(q_BTHC, kv_BTC, entry_BSC, sink_H, sight)


@torch.no_grad()
def attend_keys(q_BQHC: Tensor, key_BKC: Tensor, visible_BQK: Tensor, sink_H: Tensor) -> Tensor:
    """`attend` of a few queries to explicit keys, for decoding: each sees the keys where visible_BQK is true."""
    _, key_BKC, score_BQHK = _scores(q_BQHC, key_BKC, visible_BQK)
    return _weigh(score_BQHK, key_BKC, sink_H)[0].to(q_BQHC.dtype)
