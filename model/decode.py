"""Decoding with the compressed cache: a prompt at once, then token by token, equal to the whole forward pass.

A token costs the window and its visible entries, not the row: every equation is the free function that training uses.
The MTP branch takes no part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model import indexer
from model.attend import attend_keys
from model.attention import Attention, Place
from model.cache import Cache, LayerCache, allocate, lengths_tensor
from model.config import AttentionMode
from model.rope import Rotation
from model.sight import Sight
from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Now:
    """The position of each row's new token, its rotation in layers with a window only and in the others.

    turn: the rotation at given positions [B, T] in layers with compression. most: tokens of the longest row, with the
    new one.
    """

    position_B: Tensor
    window_turn: Rotation
    compressed_turn: Rotation
    turn: Callable[[Tensor], Rotation]
    most: int


@torch.no_grad()
def prefill(
    model: Transformer, token_BT: Tensor, lengths: Sequence[int], *, limit: int, mode: AttentionMode
) -> tuple[Cache, Tensor]:
    """A new cache after the prompts, and logits_BV (at least fp32) of the token after each.

    token_BT: int64, row b's prompt in its first lengths[b] >= 1 places, any ids behind it. limit: the most tokens a
    row will have, at least T. mode: other than sparse attends to every visible entry. Raises ValueError if limit is too
    long.
    """
    assert min(lengths) >= 1
    assert max(lengths) <= token_BT.shape[1] <= limit
    cache = allocate(model.config, len(token_BT), limit, mode, model.dtype, token_BT.device, model.numbers)
    cache.lengths = tuple(lengths)
    length_B = lengths_tensor(lengths, token_BT.device)
    # What lies behind a prompt goes on as the same document: nothing before it can see it.
    position_BT = torch.arange(token_BT.shape[1], device=token_BT.device).expand_as(token_BT)
    place = model.place(torch.zeros_like(token_BT), position_BT, mode, False)

    def attention(attn: Attention, layer: LayerCache, h_BTD: Tensor) -> Tensor:
        return _attend_rows(attn, layer, h_BTD, place, length_B)

    def end(x_BTND: Tensor) -> Tensor:
        x_B1ND = x_BTND[torch.arange(len(token_BT), device=token_BT.device), length_B - 1].unsqueeze(1)
        return model.logits(model.hidden(x_B1ND))[:, 0]

    return cache, model.relay(model, token_BT, partial(_advance, model, cache, token_BT, attention), end)


@torch.no_grad()
def step(model: Transformer, cache: Cache, token_B: Tensor) -> Tensor:
    """Take in one token of each row, int64 [B]; returns logits_BV (at least fp32) of the token after it."""
    assert max(cache.lengths) < cache.limit, "the cache was allocated for fewer tokens"
    position_B = lengths_tensor(cache.lengths, token_B.device)
    now = Now(
        position_B=position_B,
        window_turn=model.turn(position_B.unsqueeze(1), compressed=False),
        compressed_turn=model.turn(position_B.unsqueeze(1), compressed=True),
        turn=lambda position: model.turn(position, compressed=True),
        most=max(cache.lengths) + 1,
    )

    def attention(attn: Attention, layer: LayerCache, h_B1D: Tensor) -> Tensor:
        return _attend_token(attn, layer, h_B1D, now)

    token_B1 = token_B.unsqueeze(1)
    advance = partial(_advance, model, cache, token_B1, attention)
    logits_BV = model.relay(model, token_B1, advance, lambda x_B1ND: model.logits(model.hidden(x_B1ND))[:, 0])
    cache.lengths = tuple(length + 1 for length in cache.lengths)
    return logits_BV


def _advance(
    model: Transformer,
    cache: Cache,
    token_BT: Tensor,
    attention: Callable[[Attention, LayerCache, Tensor], Tensor],
    layers: range,
    x_BTND: Tensor,
) -> Tensor:
    """`Transformer.forward` through these layers, with another attention and without loss terms."""
    document_BT = torch.zeros_like(token_BT)
    for block, layer in zip(model.stretch(layers), (cache.layers[number] for number in layers), strict=True):
        u_BTD, post, comb = block.site(x_BTND, block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale)
        x_BTND = block.expand(x_BTND, attention(block.attn, layer, block.attn_norm(u_BTD)), post, comb)
        u_BTD, post, comb = block.site(x_BTND, block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale)
        y_BTD, _ = block.ffn(block.ffn_norm(u_BTD), token_BT, document_BT)
        x_BTND = block.expand(x_BTND, y_BTD, post, comb)
    return x_BTND


def _attend_rows(attn: Attention, layer: LayerCache, h_BTD: Tensor, place: Place, length_B: Tensor) -> Tensor:
    """`Attention.forward` of whole rows, which fills the layer's cache on the way."""
    turn_T = place.token_turn[attn.ratio]
    q_BTHC, qr_BTQ = attn.queries(h_BTD, turn_T)
    kv_BTC = attn.keys(h_BTD, turn_T)
    layer.fill_window(kv_BTC, length_B)
    sight = Sight(layout=place.layout, window=attn.config.sliding_window, ratio=attn.ratio)
    entry_BSC = None
    if attn.compressor is not None and layer.entries is not None:
        blocks, turn_S = place.layout.blocks[attn.ratio], place.block_turn[attn.ratio]
        entry_BSC = attn.compressor(h_BTD, blocks, turn_S)
        layer.entries.fill(attn.compressor, h_BTD, entry_BSC, length_B)
        if attn.indexer is not None and layer.keys is not None:
            index = attn.indexer(h_BTD, qr_BTQ, blocks, turn_T, turn_S)
            layer.keys.fill(attn.indexer.compressor, h_BTD, index.k_BSJ, length_B)
            sight = sight.restricted(attn.select(index, attn.config.index_topk, sight))
    o_BTHC, _ = attn.attend(q_BTHC, kv_BTC, entry_BSC, attn.attn_sink, sight)
    return attn.output(o_BTHC, turn_T)


def _attend_token(attn: Attention, layer: LayerCache, h_B1D: Tensor, now: Now) -> Tensor:
    """The same for one new token of each row, from the cache."""
    turn = now.compressed_turn if attn.ratio else now.window_turn
    q_B1HC, qr_B1Q = attn.queries(h_B1D, turn)
    layer.add_window(attn.keys(h_B1D, turn), now.position_B)
    key_BKC = layer.window_BWC
    visible_BK = torch.arange(key_BKC.shape[1], device=key_BKC.device) <= now.position_B.unsqueeze(1)
    if attn.ratio:
        entry_BSC, visible_BS = _entries(attn, layer, h_B1D, qr_B1Q, now)
        key_BKC, visible_BK = torch.cat((key_BKC, entry_BSC), 1), torch.cat((visible_BK, visible_BS), 1)
    return attn.output(attend_keys(q_B1HC, key_BKC, visible_BK.unsqueeze(1), attn.attn_sink), turn)


def _entries(attn: Attention, layer: LayerCache, h_B1D: Tensor, qr_B1Q: Tensor, now: Now) -> tuple[Tensor, Tensor]:
    """The entries a new token may attend to, [B, S, C], and True where it does; of an indexed layer the selected."""
    assert attn.compressor is not None
    assert layer.entries is not None
    layer.entries.add(attn.compressor, h_B1D, now.position_B, now.turn)
    slots = now.most // attn.ratio
    entry_BSC = layer.entries.entry_BSC[:, :slots]
    complete_B1 = ((now.position_B + 1) // attn.ratio).unsqueeze(1)
    visible_BS = torch.arange(slots, device=complete_B1.device) < complete_B1
    if attn.indexer is None or layer.keys is None:
        return entry_BSC, visible_BS
    layer.keys.add(attn.indexer.compressor, h_B1D, now.position_B, now.turn)
    q_B1IJ, w_B1I = attn.indexer.queries(h_B1D, qr_B1Q, now.compressed_turn)
    score_B1S = indexer.scores(q_B1IJ, layer.keys.entry_BSC[:, :slots], w_B1I)
    slot_BZ = indexer.top(score_B1S, visible_BS.unsqueeze(1), min(attn.config.index_topk, slots))[:, 0]
    row_B1 = torch.arange(len(slot_BZ), device=slot_BZ.device).unsqueeze(1)
    return entry_BSC[row_B1, slot_BZ.clamp_min(0)], slot_BZ >= 0
