"""What each query of a packed row may see, and the row in chunks of queries, so that no mask outlives its chunk."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.visibility import Blocks, Layout

CHUNK = 64
"""Least queries per chunk, which otherwise has as many as the window: half of its window keys are then in the band."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The queries first..last of a row, and what they may see: window tokens from `window_first`, entries 0..entries.

    selected_BTZ: slots to which a query is restricted, -1 for an unused pick; None for all visible ones.
    Masks are made when asked for, never kept.
    """

    first: int
    last: int
    window_first: int
    entries: int
    layout: Layout
    blocks: Blocks | None
    selected_BTZ: Tensor | None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    def visible_window(self) -> Tensor:
        """True where query Q sees window token W, [B, Q, W]."""
        key_W = torch.arange(self.window_first, self.last, device=self.layout.position_BT.device)
        query_Q1 = torch.arange(self.first, self.last, device=key_W.device).unsqueeze(-1)
        return (key_W >= self.layout.window_low_BT[:, self.rows].unsqueeze(-1)) & (key_W <= query_Q1)

    def visible_entries(self) -> Tensor:
        """True where query Q sees compressed slot S, [B, Q, entries]."""
        assert self.blocks is not None
        slot_S = torch.arange(self.entries, device=self.layout.position_BT.device)
        low_BQ1 = self.blocks.low_BT[:, self.rows].unsqueeze(-1)
        high_BQ1 = self.blocks.high_BT[:, self.rows].unsqueeze(-1)
        visible_BQS = (slot_S >= low_BQ1) & (slot_S < high_BQ1)
        if self.selected_BTZ is None:
            return visible_BQS
        slot_BQZ = self.selected_BTZ[:, self.rows]
        chosen = torch.zeros(*visible_BQS.shape[:2], self.entries + 1, dtype=torch.bool, device=slot_S.device)
        chosen = chosen.scatter(2, slot_BQZ.masked_fill(slot_BQZ < 0, self.entries), True)
        return visible_BQS & chosen[..., : self.entries]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """One layer's view of a batch: `window` tokens back, and the slots of rate `ratio` (0: none).

    selected_BTZ: the slots to which each query is restricted, int64, -1 for an unused pick; None for all visible ones.
    """

    layout: Layout
    window: int
    ratio: int
    selected_BTZ: Tensor | None = None

    @property
    def blocks(self) -> Blocks | None:
        """The blocks of the rate, None for a layer with a window only."""
        return self.layout.blocks[self.ratio] if self.ratio else None

    def restricted(self, selected_BTZ: Tensor) -> "Sight":
        """The same, of the selected slots only."""
        return replace(self, selected_BTZ=selected_BTZ)

    def chunks(self) -> tuple[Chunk, ...]:
        """The row in order. A query can only see the slots complete by the end of its chunk: last // ratio."""
        T, size = self.layout.position_BT.shape[1], max(CHUNK, self.window)
        return tuple(
            Chunk(
                first=first,
                last=min(first + size, T),
                window_first=max(0, first - self.window + 1),
                entries=min(first + size, T) // self.ratio if self.ratio else 0,
                layout=self.layout,
                blocks=self.blocks,
                selected_BTZ=self.selected_BTZ,
            )
            for first in range(0, T, size)
        )
