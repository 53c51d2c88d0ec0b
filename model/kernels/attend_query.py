"""Kernels of attention with sink that go by query: outputs, and gradients of the queries.

A program has one query and a tile of its heads, because all heads share one key per position (multi-query attention):
so even a window of 128 keys fills a matrix product. In one loop it walks the window, low <= j <= t, and then entries,
begin <= i < end: slots i, or those that a list of picks has at i (ENTRIES: none, range, picks; a pick of -1 is unused).
Products have the type of their inputs and are summed in fp32.
"""

import triton
from triton import language as tl


@triton.jit
def rows(ptr, row_K, seen_K, C: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows row_K of a matrix with C columns, 0 where not seen: [K, CHANNELS]."""
    channel_C = tl.arange(0, CHANNELS)
    mask_KC = seen_K[:, None] & (channel_C < C)[None, :]
    return tl.load(ptr + row_K[:, None].to(tl.int64) * C + channel_C[None, :], mask=mask_KC, other=0.0)


@triton.jit
def store_rows(ptr, row_K, value_KC, seen_K, C: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of `rows`."""
    channel_C = tl.arange(0, CHANNELS)
    mask_KC = seen_K[:, None] & (channel_C < C)[None, :]
    place_KC = ptr + row_K[:, None].to(tl.int64) * C + channel_C[None, :]
    tl.store(place_KC, value_KC.to(ptr.dtype.element_ty), mask=mask_KC)


@triton.jit
def _walk(window_low_ptr, begin_ptr, end_ptr, query, T, ENTRIES: tl.constexpr):
    """What the query walks: first key of its window, first entry, how many keys in the window and how many in all."""
    low, begin, end = tl.load(window_low_ptr + query), tl.load(begin_ptr + query), tl.load(end_ptr + query)
    window = query % T + 1 - low
    return low, begin, window, window + (0 if ENTRIES == "none" else end - begin)


@triton.jit
def _keys(
    kv_ptr, entry_ptr, selected_ptr, place_K, window, low, begin, count, query, T, S, Z,
    C: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Keys at these places of what the query walks, [K, CHANNELS] and which are seen: its window, then entries."""
    row, seen_K = query // T, place_K < count
    key_K = kv_ptr + (row * T + low + place_K) * C
    if ENTRIES != "none":
        slot_K = begin + place_K - window
        if ENTRIES == "picks":
            picked_K = seen_K & (place_K >= window)
            slot_K = tl.load(selected_ptr + query * Z + slot_K, mask=picked_K, other=0).to(tl.int64)
            seen_K = seen_K & (slot_K >= 0)
        key_K = tl.where(place_K < window, key_K, entry_ptr + (row * S + slot_K) * C)
    channel_C = tl.arange(0, CHANNELS)
    mask_KC = seen_K[:, None] & (channel_C < C)[None, :]
    return tl.load(key_K[:, None] + channel_C[None, :], mask=mask_KC, other=0.0), seen_K


@triton.jit
def _weigh(q_HC, key_KC, seen_K, scale, top_H, total_H, o_HC):
    """One step of the online softmax: largest score, sum of exponentials and weighted sum of keys so far."""
    z_HK = tl.dot(q_HC, tl.trans(key_KC), input_precision="ieee") * scale
    z_HK = tl.where(seen_K[None, :], z_HK, float("-inf"))
    higher_H = tl.maximum(top_H, tl.max(z_HK, 1))
    p_HK = tl.exp(z_HK - higher_H[:, None])
    shrink_H = tl.exp(top_H - higher_H)
    total_H = total_H * shrink_H + tl.sum(p_HK, 1)
    o_HC = tl.dot(p_HK.to(key_KC.dtype), key_KC, acc=o_HC * shrink_H[:, None], input_precision="ieee")
    return higher_H, total_H, o_HC


@triton.jit
def attend_forward(
    q_ptr, kv_ptr, entry_ptr, sink_ptr, window_low_ptr, begin_ptr, end_ptr, selected_ptr,
    o_ptr, lse_ptr,
    T, S, Z, scale,
    H: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """o and lse of one query and one tile of heads; grid (B T, tiles of heads)."""
    query = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real_H = head_H < H
    q_HC = rows(q_ptr, query * H + head_H, real_H, C, CHANNELS)
    # The sink is a key whose value is zero: it begins the sum.
    top_H = tl.load(sink_ptr + head_H, mask=real_H, other=0.0).to(tl.float32)
    total_H = tl.full([HEADS], 1.0, tl.float32)
    o_HC = tl.zeros([HEADS, CHANNELS], tl.float32)
    low, begin, window, count = _walk(window_low_ptr, begin_ptr, end_ptr, query, T, ENTRIES)
    for first in range(0, count, KEYS):
        place_K = first + tl.arange(0, KEYS)
        key_KC, seen_K = _keys(
            kv_ptr, entry_ptr, selected_ptr, place_K, window, low, begin, count, query, T, S, Z, C, CHANNELS, ENTRIES
        )
        top_H, total_H, o_HC = _weigh(q_HC, key_KC, seen_K, scale, top_H, total_H, o_HC)
    store_rows(o_ptr, query * H + head_H, o_HC / total_H[:, None], real_H, C, CHANNELS)
    tl.store(lse_ptr + query * H + head_H, top_H + tl.log(total_H), mask=real_H)


@triton.jit
def _pull(q_HC, g_HC, key_KC, seen_K, lse_H, mean_H, scale, grad_HC):
    """Adds to the gradient of the scaled queries what these keys give."""
    key_CK = tl.trans(key_KC)
    z_HK = tl.dot(q_HC, key_CK, input_precision="ieee") * scale
    p_HK = tl.where(seen_K[None, :], tl.exp(z_HK - lse_H[:, None]), 0.0)
    grad_HK = p_HK * (tl.dot(g_HC, key_CK, input_precision="ieee") - mean_H[:, None])
    return tl.dot(grad_HK.to(key_KC.dtype), key_KC, acc=grad_HC, input_precision="ieee")


@triton.jit
def _mean(g_ptr, o_ptr, pair_H, real_H, C: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr):
    """sum_j p_j dp_j = g . o, in pieces of the channels: two whole tiles more would not fit into the registers."""
    PIECE: tl.constexpr = 64 if CHANNELS > 64 else CHANNELS
    mean_H = tl.zeros([HEADS], tl.float32)
    for first in range(0, C, PIECE):
        channel_C = first + tl.arange(0, PIECE)
        mask_HC = real_H[:, None] & (channel_C < C)[None, :]
        at_HC = pair_H[:, None] * C + channel_C[None, :]
        g_HC = tl.load(g_ptr + at_HC, mask=mask_HC, other=0.0).to(tl.float32)
        mean_H += tl.sum(g_HC * tl.load(o_ptr + at_HC, mask=mask_HC, other=0.0).to(tl.float32), 1)
    return mean_H


@triton.jit
def attend_backward_query(
    q_ptr, kv_ptr, entry_ptr, g_ptr, o_ptr, lse_ptr, window_low_ptr, begin_ptr, end_ptr, selected_ptr,
    grad_ptr, mean_ptr,
    T, S, Z, scale,
    H: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and mean = sum_j p_j dp_j, for one query and one tile of heads; grid as forwards."""
    query = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real_H = head_H < H
    q_HC = rows(q_ptr, query * H + head_H, real_H, C, CHANNELS)
    g_HC = rows(g_ptr, query * H + head_H, real_H, C, CHANNELS)
    mean_H = _mean(g_ptr, o_ptr, query * H + head_H, real_H, C, CHANNELS, HEADS)
    tl.store(mean_ptr + query * H + head_H, mean_H, mask=real_H)
    lse_H = tl.load(lse_ptr + query * H + head_H, mask=real_H, other=0.0)
    grad_HC = tl.zeros([HEADS, CHANNELS], tl.float32)
    low, begin, window, count = _walk(window_low_ptr, begin_ptr, end_ptr, query, T, ENTRIES)
    for first in range(0, count, KEYS):
        place_K = first + tl.arange(0, KEYS)
        key_KC, seen_K = _keys(
            kv_ptr, entry_ptr, selected_ptr, place_K, window, low, begin, count, query, T, S, Z, C, CHANNELS, ENTRIES
        )
        grad_HC = _pull(q_HC, g_HC, key_KC, seen_K, lse_H, mean_H, scale, grad_HC)
    store_rows(grad_ptr, query * H + head_H, grad_HC * scale, real_H, C, CHANNELS)
