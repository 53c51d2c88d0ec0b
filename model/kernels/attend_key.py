"""Kernels of attention with sink that go by key: gradients of window keys and of compressed entries, without atomics.

A key's gradient is a sum over the queries that see it, always in the same order, so its bits repeat. Where a query
sees a range, the queries that see a tile of keys are a range too: a program walks it. Where a query has a list of
picks, every pick's share is written out, and then each slot adds its own in the order of the queries.
"""

import triton
from triton import language as tl

from model.kernels.attend_query import rows, store_rows


@triton.jit
def _share(
    key_KC, pair_R, seen_KR, grad_KC,
    q_ptr, g_ptr, lse_ptr, mean_ptr, last_pair, scale,
    C: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds to the keys' gradients what these pairs of query and head give: as keys (ds q) and as values (p g)."""
    real_R = pair_R < last_pair
    q_RC = rows(q_ptr, pair_R, real_R, C, CHANNELS)
    g_RC = rows(g_ptr, pair_R, real_R, C, CHANNELS)
    lse_R = tl.load(lse_ptr + pair_R, mask=real_R, other=0.0)
    mean_R = tl.load(mean_ptr + pair_R, mask=real_R, other=0.0)
    z_KR = tl.dot(key_KC, tl.trans(q_RC), input_precision="ieee") * scale
    p_KR = tl.where(seen_KR & real_R[None, :], tl.exp(z_KR - lse_R[None, :]), 0.0)
    grad_KR = p_KR * (tl.dot(key_KC, tl.trans(g_RC), input_precision="ieee") - mean_R[None, :]) * scale
    grad_KC = tl.dot(p_KR.to(g_RC.dtype), g_RC, acc=grad_KC, input_precision="ieee")
    return tl.dot(grad_KR.to(q_RC.dtype), q_RC, acc=grad_KC, input_precision="ieee")


@triton.jit
def attend_backward_range(
    key_ptr, q_ptr, g_ptr, lse_ptr, mean_ptr, low_ptr, high_ptr, first_ptr, last_ptr,
    grad_ptr,
    B, T, S, pieces, scale,
    H: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys from one piece of the queries first <= t < last; grid (tiles, pieces, B).

    Query t sees key s where low[t] <= s < high[t]. grad: fp32 [pieces, B, S, C].
    """
    piece, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot_K = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    key_KC = rows(key_ptr, row * S + slot_K, slot_K < S, C, CHANNELS)
    tile = row * tl.num_programs(0) + tl.program_id(0)
    begin, end = tl.load(first_ptr + tile), tl.load(last_ptr + tile)
    size = (end - begin + pieces - 1) // pieces
    begin = begin + piece * size
    last_pair = (row * T + tl.minimum(end, begin + size)) * H
    grad_KC = tl.zeros([KEYS, CHANNELS], tl.float32)
    for first in range((row * T + begin) * H, last_pair, PAIRS):
        pair_R = first + tl.arange(0, PAIRS)
        low_R = tl.load(low_ptr + pair_R // H, mask=pair_R < last_pair, other=0)
        high_R = tl.load(high_ptr + pair_R // H, mask=pair_R < last_pair, other=0)
        seen_KR = (slot_K[:, None] >= low_R[None, :]) & (slot_K[:, None] < high_R[None, :])
        grad_KC = _share(
            key_KC, pair_R, seen_KR, grad_KC, q_ptr, g_ptr, lse_ptr, mean_ptr, last_pair, scale, C, CHANNELS
        )
    store_rows(grad_ptr, (piece * B + row) * S + slot_K, grad_KC, slot_K < S, C, CHANNELS)


@triton.jit
def attend_backward_picks(
    entry_ptr, q_ptr, g_ptr, lse_ptr, mean_ptr, selected_ptr, end_ptr,
    share_ptr,
    start, T, S, Z, scale,
    H: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Share of one query in the gradients of a tile of its picks; grid (queries from `start`, tiles of picks).

    share: [queries, Z, C]; what stands at a pick of -1 is not used.
    """
    query = start + tl.program_id(0).to(tl.int64)
    place_K = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    used = tl.load(end_ptr + query)
    if tl.program_id(1) * KEYS < used:
        slot_K = tl.load(selected_ptr + query * Z + place_K, mask=place_K < used, other=-1)
        key_KC = rows(entry_ptr, query // T * S + slot_K, slot_K >= 0, C, CHANNELS)
        grad_KC = tl.zeros([KEYS, CHANNELS], tl.float32)
        for first in range(query * H, (query + 1) * H, PAIRS):
            pair_R = first + tl.arange(0, PAIRS)
            seen_KR = (slot_K >= 0)[:, None] & (pair_R >= 0)[None, :]
            grad_KC = _share(
                key_KC, pair_R, seen_KR, grad_KC, q_ptr, g_ptr, lse_ptr, mean_ptr, (query + 1) * H, scale, C, CHANNELS
            )
        store_rows(share_ptr, tl.program_id(0).to(tl.int64) * Z + place_K, grad_KC, place_K < used, C, CHANNELS)


@triton.jit
def add_picks(
    share_ptr, pick_ptr, offset_ptr, grad_ptr, C: tl.constexpr, CHANNELS: tl.constexpr, PICKS: tl.constexpr
):  # fmt: skip
    """grad[slot] += the shares pick[offset[slot]] .. pick[offset[slot + 1] - 1], in that order; grid (slots,)."""
    slot = tl.program_id(0).to(tl.int64)
    last = tl.load(offset_ptr + slot + 1)
    grad_C = tl.zeros([CHANNELS], tl.float32)
    for first in range(tl.load(offset_ptr + slot), last, PICKS):
        place_Z = first + tl.arange(0, PICKS)
        pick_Z = tl.load(pick_ptr + place_Z, mask=place_Z < last, other=0)
        grad_C += tl.sum(rows(share_ptr, pick_Z, place_Z < last, C, CHANNELS).to(tl.float32), 0)
    channel_C = tl.arange(0, CHANNELS)
    at_C = grad_ptr + slot * C + channel_C
    tl.store(at_C, tl.load(at_C, mask=channel_C < C, other=0.0) + grad_C, mask=channel_C < C)
