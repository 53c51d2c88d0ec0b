"""Softmax with sink over a token's window and its visible compressed entries (R eq. 27), in query chunks.

Keys and values are the same vectors, shared by all heads. Nothing of size T x T or T x S outlives its chunk: the
backward pass, written by hand, computes the probabilities of each chunk again. So memory grows linearly with T.
A chunk's keys are one or two tensors: those that all its queries share, and those gathered for each query.
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
            keys, visible = _keys(kv_BTC, entry_BSC, chunk)
            o_BQHC, lse_BQH = _weigh(_scores(_scaled(q_BTHC, chunk), keys, visible), keys, sink_H)
            out.append(o_BQHC.to(q_BTHC.dtype))
            lse.append(lse_BQH)
        o_BTHC, lse_BTH = torch.cat(out, dim=1), torch.cat(lse, dim=1)
        # The selection too: what is not saved so, recomputation cannot let go of.
        ctx.save_for_backward(q_BTHC, kv_BTC, entry_BSC, sink_H, o_BTHC, lse_BTH, sight.selected_BTZ)
        ctx.dense = sight.restricted(None)
        ctx.mark_non_differentiable(lse_BTH)
        return o_BTHC, lse_BTH

    @staticmethod
    def backward(ctx: Any, grad_BTHC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHC, kv_BTC, entry_BSC, sink_H, o_BTHC, lse_BTH, selected_BTZ = ctx.saved_tensors
        grad_q = torch.empty_like(q_BTHC)
        grad_kv = torch.zeros_like(at_least_fp32(kv_BTC))
        grad_entry = torch.zeros_like(at_least_fp32(entry_BSC))
        # sum_j p_j dp_j of the softmax's backward pass is the product of the output and its gradient.
        mean_BTH = (at_least_fp32(grad_BTHC) * at_least_fp32(o_BTHC)).sum(-1)
        for chunk in ctx.dense.restricted(selected_BTZ).chunks():
            keys, visible = _keys(kv_BTC, entry_BSC, chunk)
            q_BQHC, grad_BQHC = _scaled(q_BTHC, chunk), at_least_fp32(grad_BTHC[:, chunk.rows])
            p_BQHK = _scores(q_BQHC, keys, visible).sub_(lse_BTH[:, chunk.rows].unsqueeze(-1)).exp_()
            mean_BQH1 = mean_BTH[:, chunk.rows].unsqueeze(-1)
            grad_q_BQHC, grad_keys = torch.zeros_like(q_BQHC), []
            for p, key in zip(p_BQHK.split([key.shape[-2] for key in keys], dim=-1), keys, strict=True):
                grad_score = products(grad_BQHC, key).sub_(mean_BQH1).mul_(p)
                grad_q_BQHC += mixture(grad_score, key)
                grad_keys.append(_to_keys(grad_score, q_BQHC, key) + _to_keys(p, grad_BQHC, key))
            grad_q[:, chunk.rows] = grad_q_BQHC * q_BTHC.shape[-1] ** -0.5
            window = chunk.last - chunk.window_first
            grad_kv[:, chunk.window_first : chunk.last] += grad_keys[0][:, :window]
            if chunk.entries:
                chunk.add_to_entries(grad_entry, grad_keys[1] if len(keys) > 1 else grad_keys[0][:, window:])
        grad_sink = -(torch.exp(at_least_fp32(sink_H) - lse_BTH) * mean_BTH).sum((0, 1))
        return grad_q, grad_kv.to(kv_BTC.dtype), grad_entry.to(entry_BSC.dtype), grad_sink.to(sink_H.dtype), None


def products(q_BQHC: Tensor, key: Tensor) -> Tensor:
    """q_h . k_j, [B, Q, H, K]: of keys that all queries share, [B, K, C], or of each query's own, [B, Q, K, C]."""
    if key.dim() == 4:
        return q_BQHC @ key.transpose(2, 3)
    return (q_BQHC.flatten(1, 2) @ key.transpose(1, 2)).unflatten(1, q_BQHC.shape[1:3])


def mixture(p_BQHK: Tensor, key: Tensor) -> Tensor:
    """sum_j p_hj k_j, [B, Q, H, C], of shared or own keys."""
    if key.dim() == 4:
        return p_BQHK @ key
    return (p_BQHK.flatten(1, 2) @ key).unflatten(1, p_BQHK.shape[1:3])


def _to_keys(p_BQHK: Tensor, x_BQHC: Tensor, key: Tensor) -> Tensor:
    """sum_h p_hj x_h in the shape of `key`; over the queries too where they share it."""
    if key.dim() == 4:
        return p_BQHK.transpose(2, 3) @ x_BQHC
    return p_BQHK.flatten(1, 2).transpose(1, 2) @ x_BQHC.flatten(1, 2)


def _keys(kv_BTC: Tensor, entry_BSC: Tensor, chunk: Chunk) -> tuple[list[Tensor], Tensor]:
    """The chunk's keys in at least fp32 and what its queries see of them, [B, Q, K]: window, then entries.

    Entries that all queries share are joined to the window; gathered ones are keys of their own.
    """
    window_BWC, visible = kv_BTC[:, chunk.window_first : chunk.last], chunk.visible_window()
    if not chunk.entries:
        return [at_least_fp32(window_BWC)], visible
    entry, visible = chunk.of_entries(entry_BSC), torch.cat((visible, chunk.visible_entries()), dim=-1)
    if entry.dim() == 4:
        return [at_least_fp32(window_BWC), at_least_fp32(entry)], visible
    return [at_least_fp32(torch.cat((window_BWC, entry), dim=1))], visible


def _scaled(q_BTHC: Tensor, chunk: Chunk) -> Tensor:
    """The chunk's queries over sqrt(C), in at least fp32."""
    return at_least_fp32(q_BTHC[:, chunk.rows]) * q_BTHC.shape[-1] ** -0.5


def _scores(q_BQHC: Tensor, keys: list[Tensor], visible_BQK: Tensor) -> Tensor:
    """Products of the scaled queries with all keys, -inf where invisible: [B, Q, H, K]."""
    found = [products(q_BQHC, key) for key in keys]
    score_BQHK = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
    return score_BQHK.masked_fill_(~visible_BQK.unsqueeze(2), -torch.inf)


def _weigh(score_BQHK: Tensor, keys: list[Tensor], sink_H: Tensor) -> tuple[Tensor, Tensor]:
    """o_BQHC and log of the denominator lse_BQH; the scores are overwritten."""
    sink_H1 = at_least_fp32(sink_H).unsqueeze(-1)
    max_BQH1 = torch.maximum(score_BQHK.amax(-1, keepdim=True), sink_H1)
    exp_BQHK = score_BQHK.sub_(max_BQH1).exp_()
    total_BQH1 = exp_BQHK.sum(-1, keepdim=True) + torch.exp(sink_H1 - max_BQH1)
    parts = exp_BQHK.split([key.shape[-2] for key in keys], dim=-1)
    value_BQHC = sum(mixture(part, key) for part, key in zip(parts, keys, strict=True))
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
    key_BKC = at_least_fp32(key_BKC)
    score_BQHK = _scores(at_least_fp32(q_BQHC) * q_BQHC.shape[-1] ** -0.5, [key_BKC], visible_BQK)
    return _weigh(score_BQHK, [key_BKC], sink_H)[0].to(q_BQHC.dtype)
