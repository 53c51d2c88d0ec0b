"""The lightning indexer of CSA: which compressed blocks a query attends to, and how it learns that.

Source: R 2.3.1 eqs. 13-17 (scores, top-k; spec 3.3); objective: V3.2 report 2.1, adapted to blocks (spec 6).
The Hadamard rotation before FP4 cancels in the product of unquantised q and k: it is a part of their rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.attend import products
from model.compressor import Compressor
from model.config import CSA_RATIO, ModelConfig
from model.layers import Linear, Rounding, at_least_fp32, unrounded
from model.rope import Rotation, rotate
from model.sight import Chunk, Sight
from model.visibility import Blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """Queries q_BTIJ, keys k_BSJ and head weights w_BTI of the indexer, all detached from the main model."""

    q_BTIJ: Tensor
    k_BSJ: Tensor
    w_BTI: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the indexer is to predict, detached: the main attention's q, entries and log denominators."""

    q_BTHC: Tensor
    entry_BSC: Tensor
    lse_BTH: Tensor


class Indexer(nn.Module):
    """wq_b [I J, Q], weights_proj [I, D], a compressor of width J. Inputs are detached: it learns from its KL only.

    `rounding` is a precision seam: what rotated queries go through; keys go through that of the compressor.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.rounding: Rounding = unrounded
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, dtype)
        self.weights_proj = Linear(config.hidden_size, self.heads, dtype)
        self.compressor = Compressor(
            config.hidden_size, self.dim, CSA_RATIO, overlap=True, eps=config.rms_norm_eps, dtype=dtype
        )

    def forward(self, h_BTD: Tensor, qr_BTQ: Tensor, blocks: Blocks, turn_T: Rotation, turn_S: Rotation) -> Index:
        h_BTD, qr_BTQ = h_BTD.detach(), qr_BTQ.detach()
        q_BTIJ, w_BTI = self.queries(h_BTD, qr_BTQ, turn_T)
        return Index(q_BTIJ=q_BTIJ, k_BSJ=self.compressor(h_BTD, blocks, turn_S), w_BTI=w_BTI)

    def queries(self, h_BTD: Tensor, qr_BTQ: Tensor, turn_T: Rotation) -> tuple[Tensor, Tensor]:
        """q_BTIJ, rotated and rounded, and the heads' weights w_BTI in at least fp32."""
        q_BTIJ = rotate(self.wq_b(qr_BTQ).unflatten(-1, (self.heads, self.dim)), turn_T)
        return self.rounding(q_BTIJ), at_least_fp32(self.weights_proj(h_BTD)) * (self.dim**-0.5 * self.heads**-0.5)


def scores(q_BQIJ: Tensor, key: Tensor, w_BQI: Tensor) -> Tensor:
    """I_ts = sum_h w_th relu(q_th . k_s), [B, Q, S] in at least fp32; keys shared, [B, S, J], or own, [B, Q, S, J]."""
    relu_BQIS = torch.relu(products(at_least_fp32(q_BQIJ), at_least_fp32(key)))
    return torch.matmul(w_BQI.unsqueeze(-2), relu_BQIS).squeeze(-2)


@torch.no_grad()
def select(index: Index, topk: int, sight: Sight) -> Tensor:
    """The top-k visible slots of every query, [B, T, Z] with Z = min(topk, S); -1 where fewer are visible.

    Ties go to the earlier block, so that a choice never depends on what else is in the row.
    """
    count = min(topk, index.k_BSJ.shape[1])
    return torch.cat([top(_chunk_scores(index, chunk), chunk.visible_entries(), count) for chunk in sight.chunks()], 1)


def _chunk_scores(index: Index, chunk: Chunk) -> Tensor:
    return scores(index.q_BTIJ[:, chunk.rows], index.k_BSJ[:, : chunk.entries], index.w_BTI[:, chunk.rows])


def top(score_BQS: Tensor, visible_BQS: Tensor, count: int) -> Tensor:
    """Slots of the `count` highest visible scores, [B, Q, count]; -1 where there are fewer; ties to the earlier.

    Without a tie at the border the choice is unique; only queries with one are sorted stably, which is slower.
    """
    score_BQS = score_BQS.masked_fill(~visible_BQS, -torch.inf)
    width = min(count, score_BQS.shape[-1])
    value_BQZ, slot_BQZ = score_BQS.topk(width, dim=-1, sorted=False)
    if width:
        border_BQ1 = value_BQZ.amin(-1, keepdim=True)
        tied_BQ = ((score_BQS >= border_BQ1).sum(-1) > width) & (border_BQ1.squeeze(-1) > -torch.inf)
        slot_BQZ[tied_BQ] = score_BQS[tied_BQ].sort(dim=-1, descending=True, stable=True).indices[..., :width]
        slot_BQZ = slot_BQZ.masked_fill(~visible_BQS.gather(-1, slot_BQZ), -1)
    return nn.functional.pad(slot_BQZ, (0, count - width), value=-1)


def kl_sum(index: Index, target: Target, sight: Sight, counted_BT: Tensor) -> Tensor:
    """sum_t KL(p_t || softmax(I_t)) over counted tokens that see at least one block, a scalar in at least fp32.

    Source: V3.2 report 2.1; over compressed blocks only (ours). p_t: main attention probabilities summed over heads and
    normalised over the slots in sight: all visible ones in the dense stages, the selected ones in the sparse stage.
    Memory: linear in T; the scores of a chunk are computed again in the backward pass.
    """
    return _KlSum.apply(index.q_BTIJ, index.k_BSJ, index.w_BTI, target, sight, counted_BT)


class _KlSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTIJ: Tensor,
        k_BSJ: Tensor,
        w_BTI: Tensor,
        target: Target,
        sight: Sight,
        counted_BT: Tensor,
    ) -> Tensor:
        # Target and selection too: what is not saved so, recomputation cannot let go of.
        of_target = (target.q_BTHC, target.entry_BSC, target.lse_BTH)
        ctx.save_for_backward(q_BTIJ, k_BSJ, w_BTI, counted_BT, sight.selected_BTZ, *of_target)
        ctx.dense = sight.restricted(None)
        total = w_BTI.new_zeros(())
        for chunk in _chunks(sight):
            inputs = _chunk_inputs(q_BTIJ, at_least_fp32(k_BSJ), w_BTI, chunk)
            total = total + _chunk_kl(*inputs, target, chunk, counted_BT[:, chunk.rows])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_BTIJ, k_BSJ, w_BTI, counted_BT, selected_BTZ, q_BTHC, entry_BSC, lse_BTH = ctx.saved_tensors
        target = Target(q_BTHC=q_BTHC, entry_BSC=entry_BSC, lse_BTH=lse_BTH)
        # A key's gradient is a sum over many queries: in at least fp32, rounded once.
        k = at_least_fp32(k_BSJ)
        grad_q, grad_k, grad_w = torch.zeros_like(q_BTIJ), torch.zeros_like(k), torch.zeros_like(w_BTI)
        for chunk in _chunks(ctx.dense.restricted(selected_BTZ)):
            q, key, w = (x.detach().requires_grad_() for x in _chunk_inputs(q_BTIJ, k, w_BTI, chunk))
            with torch.enable_grad():
                divergence = _chunk_kl(q, key, w, target, chunk, counted_BT[:, chunk.rows])
            grad_q[:, chunk.rows], grad_key, grad_w[:, chunk.rows] = torch.autograd.grad(divergence, (q, key, w), grad)
            chunk.add_to_entries(grad_k, grad_key)
        return grad_q, grad_k.to(k_BSJ.dtype), grad_w, None, None, None


def _chunks(sight: Sight) -> list[Chunk]:
    """The chunks that may see an entry."""
    return [chunk for chunk in sight.chunks() if chunk.entries]


def _chunk_inputs(q_BTIJ: Tensor, k_BSJ: Tensor, w_BTI: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """What one chunk works on: its queries, the keys they may see, their head weights."""
    return q_BTIJ[:, chunk.rows], chunk.of_entries(k_BSJ), w_BTI[:, chunk.rows]


def _chunk_kl(q_BQIJ: Tensor, key: Tensor, w_BQI: Tensor, target: Target, chunk: Chunk, counted_BQ: Tensor) -> Tensor:
    p_BQS = target_probability(target, chunk)
    visible_BQS = chunk.visible_entries() & counted_BQ.unsqueeze(-1)
    # A query without any visible block keeps its finite scores and counts 0: -inf everywhere would be NaN.
    hidden_BQS = ~visible_BQS & visible_BQS.any(-1, keepdim=True)
    log_q = torch.log_softmax(scores(q_BQIJ, key, w_BQI).masked_fill(hidden_BQS, -torch.inf), dim=-1)
    divergence = torch.xlogy(p_BQS, p_BQS) - p_BQS * log_q.masked_fill(~visible_BQS, 0)
    return divergence.masked_fill(~visible_BQS, 0).sum()


@torch.no_grad()
def target_probability(target: Target, chunk: Chunk) -> Tensor:
    """p_BQS of one chunk: exp(z - lse) summed over heads, normalised over the chunk's visible slots; 0 elsewhere.

    S: all entries of the chunk, or the gathered slots of each query.
    """
    q_BQHC = at_least_fp32(target.q_BTHC[:, chunk.rows]) * target.q_BTHC.shape[-1] ** -0.5
    z_BQHS = products(q_BQHC, at_least_fp32(chunk.of_entries(target.entry_BSC)))
    p_BQHS = torch.exp(z_BQHS - target.lse_BTH[:, chunk.rows].unsqueeze(-1))
    p_BQS = p_BQHS.sum(2).masked_fill(~chunk.visible_entries(), 0)
    return p_BQS / p_BQS.sum(-1, keepdim=True).clamp_min(torch.finfo(p_BQS.dtype).tiny)


@torch.no_grad()
def recall(selected_BTZ: Tensor, target: Target, sight: Sight, counted_BT: Tensor) -> Tensor:
    """How many of the picks are also top-k of the dense attention's mass: int64 [2] = (hits, picks).

    Only counted queries that see more blocks than they may pick; `sight` must be that of dense attention.
    """
    count, total = selected_BTZ.shape[-1], torch.zeros(2, dtype=torch.int64, device=selected_BTZ.device)
    for chunk in sight.chunks():
        best_BQZ = top(target_probability(target, chunk), chunk.visible_entries(), count)
        choice_BQ = (chunk.visible_entries().sum(-1) > count) & counted_BT[:, chunk.rows]
        hit_BQ = (selected_BTZ[:, chunk.rows].unsqueeze(-1) == best_BQZ.unsqueeze(-2)).any(-1).sum(-1)
        total += torch.stack((hit_BQ[choice_BQ].sum(), choice_BQ.sum() * count))
    return total
