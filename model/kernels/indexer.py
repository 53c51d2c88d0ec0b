"""`select` by a Triton kernel: index scores as sortable integers, then torch's top-k of those.

A key holds the score's bits above and the slot below, so no two are equal and equal scores go to the earlier slot:
what a stable sort gives, without sorting all visible slots.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from model.indexer import Index
from model.kernels.operand import operand
from model.sight import Sight

QUERIES, SLOTS = 16, 128
"""Tile of a program: the keys of SLOTS slots are read once for QUERIES queries."""
KEY_BYTES = 1 << 29
"""Largest buffer of sortable integers; more queries are taken in turns."""
UNSEEN = tl.constexpr(-(1 << 63))
"""The least integer: slots that a query does not see."""


@triton.jit
def _sortable(score_S, slot_S):
    """int64 that order as the scores do, and among equal ones the earlier slot first.

    -0 would come below 0, but all zeros of one query have the same sign: -0 if all its weights are negative.
    """
    bits_S = score_S.to(tl.int32, bitcast=True)
    # Negative floats grow with their bits falling: turn those below the sign.
    bits_S = bits_S ^ ((bits_S >> 31) & 0x7FFFFFFF)
    return (bits_S.to(tl.int64) << 32) | (0x7FFFFFFF - slot_S).to(tl.int64)


@triton.jit
def score_keys(
    q_ptr, k_ptr, w_ptr, low_ptr, high_ptr, key_ptr, start, last, T, S,
    INDEX: tl.constexpr, J: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Sortable I_ts = sum_h w_th relu(q_th . k_s) of queries start <= n < last; grid (tiles of queries, of slots)."""
    head_I, channel_J = tl.arange(0, HEADS), tl.arange(0, CHANNELS)
    slot_S = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    real_I, real_J = head_I < INDEX, channel_J < J
    first = start + tl.program_id(0).to(tl.int64) * QUERIES
    for query in range(first, tl.minimum(first + QUERIES, last)):
        low, high = tl.load(low_ptr + query), tl.load(high_ptr + query)
        seen_S = (slot_S >= low) & (slot_S < high)
        place_S = key_ptr + (query - start) * S + slot_S
        tl.store(place_S, tl.full([SLOTS], UNSEEN, tl.int64), mask=(slot_S < S) & ~seen_S)
        if (low < (tl.program_id(1) + 1) * SLOTS) & (high > tl.program_id(1) * SLOTS):
            at_JS = (query // T * S + slot_S)[None, :] * J + channel_J[:, None]
            k_JS = tl.load(k_ptr + at_JS, mask=seen_S[None, :] & real_J[:, None], other=0.0)
            at_IJ = (query * INDEX + head_I)[:, None] * J + channel_J[None, :]
            q_IJ = tl.load(q_ptr + at_IJ, mask=real_I[:, None] & real_J[None, :], other=0.0)
            w_I = tl.load(w_ptr + query * INDEX + head_I, mask=real_I, other=0.0)
            relu_IS = tl.maximum(tl.dot(q_IJ, k_JS, input_precision="ieee"), 0.0)
            tl.store(place_S, _sortable(tl.sum(w_I[:, None] * relu_IS, 0), slot_S), mask=seen_S)


@torch.no_grad()
def select(index: Index, topk: int, sight: Sight) -> Tensor:
    """The top-k visible slots of every query, [B, T, Z] int64 with Z = min(topk, S), best first; -1 where fewer.

    Source: R 2.3.1 eqs. 13-17; twin of `model.indexer.select`. bf16 or fp32. Ties go to the earlier block.
    """
    assert sight.blocks is not None
    q_BTIJ, k_BSJ, w_BTI = operand(index.q_BTIJ), operand(index.k_BSJ), operand(index.w_BTI)
    (B, T, heads, J), S = q_BTIJ.shape, k_BSJ.shape[1]
    count, turn = min(topk, S), max(QUERIES, KEY_BYTES // (8 * max(S, 1)))
    selected_BTZ = torch.full((B, T, count), -1, dtype=torch.int64, device=q_BTIJ.device)
    key_QS = torch.empty(min(turn, B * T), S, dtype=torch.int64, device=q_BTIJ.device)
    tiles = {"HEADS": max(16, triton.next_power_of_2(heads)), "CHANNELS": max(16, triton.next_power_of_2(J))}
    ranges = (sight.blocks.low_BT.contiguous(), sight.blocks.high_BT.contiguous())
    for start in range(0, B * T if count else 0, turn):
        last = min(start + turn, B * T)
        grid = (triton.cdiv(last - start, QUERIES), triton.cdiv(S, SLOTS))
        arguments = (q_BTIJ, k_BSJ, w_BTI, *ranges, key_QS, start, last, T, S)
        score_keys[grid](*arguments, INDEX=heads, J=J, QUERIES=QUERIES, SLOTS=SLOTS, **tiles)
        best_QZ = key_QS[: last - start].topk(count).values
        slot_QZ = 0x7FFFFFFF - (best_QZ & 0xFFFFFFFF)
        selected_BTZ.view(B * T, count)[start:last] = slot_QZ.masked_fill(best_QZ == UNSEEN.value, -1)
    return selected_BTZ
