"""`attend` by Triton kernels: window and entries in one online softmax, forwards and backwards, no atomics.

Same meaning as `model.attend.attend`. In bf16 the probabilities and the gradients of the scores enter their products
as bf16, where the plain function has fp32, and so do the picks' shares in the gradients of entries; sums are fp32 in
both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from model.kernels import attend_key, attend_query
from model.kernels.operand import operand
from model.sight import Sight

HEADS, KEYS, PAIRS = 64, 32, 64
"""Tiles in bf16, half as large in fp32: heads of a query, keys, pairs of query and head for the kernels that go by key.

Chosen by compiling for Hopper with C = 512: no registers spill, and there are tensor-core products. Not timed yet.
"""
PROGRAMS = 512
"""Programs that the gradients of keys aim at: few keys are cut by queries. Fixed, so that bits do not hang on a GPU."""
SHARE_BYTES = 1 << 30
"""Largest buffer of written-out shares; more queries are taken in turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """What each query sees: its window, and slots begin <= s < end (range) or picks at begin <= i < end (picks)."""

    window_low_BT: Tensor
    begin_BT: Tensor
    end_BT: Tensor
    selected_BTZ: Tensor
    entries: Literal["none", "range", "picks"]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.window_low_BT, self.begin_BT, self.end_BT, self.selected_BTZ

    @classmethod
    def of(cls, tensors: Sequence[Tensor], entries: Literal["none", "range", "picks"]) -> "_View":
        """The inverse of `tensors`."""
        low_BT, begin_BT, end_BT, selected_BTZ = tensors
        return cls(window_low_BT=low_BT, begin_BT=begin_BT, end_BT=end_BT, selected_BTZ=selected_BTZ, entries=entries)


def _view(sight: Sight) -> _View:
    window_low_BT = sight.layout.window_low_BT.contiguous()
    nothing_BTZ = window_low_BT.new_empty(*window_low_BT.shape, 0)
    if sight.blocks is None or not sight.blocks.position_BS.numel():  # window only, or a row shorter than a block
        return _View.of((window_low_BT, window_low_BT, window_low_BT, nothing_BTZ), "none")
    low_BT, high_BT = sight.blocks.low_BT.contiguous(), sight.blocks.high_BT.contiguous()
    if sight.selected_BTZ is None:
        return _View.of((window_low_BT, low_BT, high_BT, nothing_BTZ), "range")
    slot_BTZ = sight.selected_BTZ
    seen_BTZ = (slot_BTZ >= low_BT.unsqueeze(-1)) & (slot_BTZ < high_BT.unsqueeze(-1))
    count_Z = torch.arange(1, slot_BTZ.shape[-1] + 1, device=slot_BTZ.device, dtype=torch.int32)
    end_BT = (seen_BTZ * count_Z).amax(-1)
    selected_BTZ = torch.where(seen_BTZ, slot_BTZ, -1).int()
    return _View.of((window_low_BT, torch.zeros_like(end_BT), end_BT, selected_BTZ), "picks")


def _width(channels: int) -> int:
    """Tiles have powers of two, and a matrix product at least 16."""
    return max(16, triton.next_power_of_2(channels))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHC: Tensor, kv_BTC: Tensor, entry_BSC: Tensor, sink_H: Tensor, view: _View
    ) -> tuple[Tensor, Tensor]:
        o_BTHC, lse_BTH = torch.empty_like(q_BTHC), q_BTHC.new_empty(q_BTHC.shape[:3], dtype=torch.float32)
        inputs = (q_BTHC, kv_BTC, entry_BSC, sink_H, *view.tensors())
        grid, sizes, tiles = _by_query(q_BTHC, entry_BSC, view, stages=2)
        attend_query.attend_forward[grid](*inputs, o_BTHC, lse_BTH, *sizes, **tiles)
        ctx.save_for_backward(q_BTHC, kv_BTC, entry_BSC, sink_H, o_BTHC, lse_BTH, *view.tensors())
        ctx.entries = view.entries
        ctx.mark_non_differentiable(lse_BTH)
        return o_BTHC, lse_BTH

    @staticmethod
    def backward(ctx: Any, grad_BTHC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHC, kv_BTC, entry_BSC, sink_H, o_BTHC, lse_BTH, *seen = ctx.saved_tensors
        view = _View.of(seen, ctx.entries)
        grad_BTHC = grad_BTHC.contiguous()
        grad_q, mean_BTH = torch.empty_like(q_BTHC), torch.empty_like(lse_BTH)
        inputs = (q_BTHC, kv_BTC, entry_BSC, grad_BTHC, o_BTHC, lse_BTH, *view.tensors())
        grid, sizes, tiles = _by_query(q_BTHC, entry_BSC, view, stages=1)
        attend_query.attend_backward_query[grid](*inputs, grad_q, mean_BTH, *sizes, **tiles)
        queries = (q_BTHC, grad_BTHC, lse_BTH, mean_BTH)
        next_T = torch.arange(1, q_BTHC.shape[1] + 1, device=q_BTHC.device).expand_as(view.window_low_BT).contiguous()
        grad_kv = _of_ranges(kv_BTC, queries, view.window_low_BT, next_T)
        if not entry_BSC.numel():
            grad_entry = torch.zeros_like(entry_BSC)
        elif view.entries == "picks":
            grad_entry = _of_picks(entry_BSC, queries, view)
        else:
            grad_entry = _of_ranges(entry_BSC, queries, view.begin_BT, view.end_BT)
        grad_sink = -(torch.exp(sink_H.float() - lse_BTH) * mean_BTH).sum((0, 1))
        return grad_q, grad_kv.to(kv_BTC.dtype), grad_entry.to(entry_BSC.dtype), grad_sink.to(sink_H.dtype), None


def _by_query(
    q_BTHC: Tensor, entry_BSC: Tensor, view: _View, stages: int
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, sizes and tiles of the kernels that go by query."""
    B, T, H, C = q_BTHC.shape
    heads = min(_tile(HEADS, q_BTHC), _width(H))
    tiles = {"H": H, "C": C, "HEADS": heads, "CHANNELS": _width(C), "KEYS": _tile(KEYS, q_BTHC)}
    sizes = (T, entry_BSC.shape[1], view.selected_BTZ.shape[-1], C**-0.5)
    options = {"ENTRIES": view.entries, "num_warps": 8, "num_stages": stages}
    return (B * T, triton.cdiv(H, heads)), sizes, tiles | options


def _by_key(q_BTHC: Tensor) -> dict[str, Any]:
    """Tiles of the kernels that go by key."""
    H, C = q_BTHC.shape[2:]
    tiles = {"H": H, "C": C, "KEYS": _tile(KEYS, q_BTHC), "CHANNELS": _width(C), "PAIRS": _tile(PAIRS, q_BTHC)}
    return tiles | {"num_warps": 8, "num_stages": 2}


def _tile(size: int, x: Tensor) -> int:
    return size * 2 // x.element_size()


def _of_ranges(key_BSC: Tensor, queries: tuple[Tensor, ...], low_BT: Tensor, high_BT: Tensor) -> Tensor:
    """Gradients of keys of which query t sees low[t] <= s < high[t], in fp32. Neither ever falls along a row."""
    (B, S, C), T = key_BSC.shape, low_BT.shape[1]
    options = _by_key(queries[0])
    keys = options["KEYS"]
    first_BK = torch.arange(0, S, keys, device=low_BT.device).expand(B, -1).contiguous()
    begin_BK = torch.searchsorted(high_BT, first_BK, right=True)
    end_BK = torch.searchsorted(low_BT, (first_BK + keys - 1).clamp(max=S - 1), right=True)
    tiles = first_BK.shape[1]
    pieces = max(1, min(PROGRAMS // (tiles * B), T // keys))
    grad = torch.empty(pieces, B, S, C, dtype=torch.float32, device=key_BSC.device)
    arguments = (key_BSC, *queries, low_BT, high_BT, begin_BK, end_BK, grad, B, T, S, pieces, C**-0.5)
    attend_key.attend_backward_range[(tiles, pieces, B)](*arguments, **options)
    return grad.sum(0)


def _of_picks(entry_BSC: Tensor, queries: tuple[Tensor, ...], view: _View) -> Tensor:
    """Gradients of entries of which every query has a list of picks, in fp32."""
    (B, S, C), (_, T, Z) = entry_BSC.shape, view.selected_BTZ.shape
    grad = torch.zeros(B, S, C, dtype=torch.float32, device=entry_BSC.device)
    count = max(1, min(B * T, SHARE_BYTES // (Z * C * entry_BSC.element_size())))
    share = torch.empty(count, Z, C, dtype=entry_BSC.dtype, device=entry_BSC.device)
    options = _by_key(queries[0])
    row_BT1 = torch.arange(B, device=entry_BSC.device).view(B, 1, 1)
    slot_NZ = torch.where(view.selected_BTZ < 0, B * S, view.selected_BTZ + row_BT1 * S).flatten(0, 1)
    for start in range(0, B * T, count):
        some = slot_NZ[start : start + count].flatten()
        arguments = (entry_BSC, *queries, view.selected_BTZ, view.end_BT, share, start, T, S, Z, C**-0.5)
        grid = (some.numel() // Z, triton.cdiv(Z, options["KEYS"]))
        attend_key.attend_backward_picks[grid](*arguments, **options)
        add_shares(share, some, grad)
    return grad


def add_shares(share_PC: Tensor, slot_P: Tensor, grad_BSC: Tensor) -> None:
    """grad[slot] += share of every pick, in the order of the picks; slots beyond the last take nothing.

    share_PC may have more dims and more rows than there are picks. grad_BSC: fp32, contiguous.
    """
    slots, C = grad_BSC.shape[:-1].numel(), grad_BSC.shape[-1]
    ordered_P, pick_P = torch.sort(slot_P, stable=True)
    offset_S = torch.searchsorted(ordered_P, torch.arange(slots + 1, device=slot_P.device))
    sizes = {"C": C, "CHANNELS": _width(C), "PICKS": 16}
    attend_key.add_picks[(slots,)](share_PC, pick_P, offset_S, grad_BSC, **sizes)


def attend(
    q_BTHC: Tensor, kv_BTC: Tensor, entry_BSC: Tensor | None, sink_H: Tensor, sight: Sight
) -> tuple[Tensor, Tensor]:
    """o_h = sum_j exp(z_hj) k_j / (sum_j exp(z_hj) + exp(sink_h)), z_hj = q_h . k_j / sqrt(C); and the logs lse_BTH.

    Source: R eq. 27 (spec 3.1); twin of `model.attend.attend`. bf16 or fp32 inputs, lse in fp32. No slot may stand
    twice in a query's selection. No atomics: every sum has one order.
    """
    if entry_BSC is None:
        entry_BSC = kv_BTC[:, :0]
    return _Attend.apply(operand(q_BTHC), operand(kv_BTC), operand(entry_BSC), operand(sink_H), _view(sight))
