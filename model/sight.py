"""What each query of a packed row may see, and the row in chunks of queries, so that no mask outlives its chunk."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.visibility import Blocks, Layout

CHUNK = 64
"""Least queries per chunk, else half as many as the window: then a third of its window keys is outside the band."""

GATHER = 3
"""Selected slots are gathered for each query where a chunk sees more than GATHER times as many, else masked.

Between what pays on one core: the debug model (4 heads of 32, 16 of 128 slots) gains nothing from gathering, a model of
8 heads of 64 with 64 of 512 slots gains from half of this on. Long rows are far above it, so attention stays linear.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The queries first..last of a row, and what they may see: window tokens from `window_first`, entries 0..entries.

    selected_BTZ: slots to which a query is restricted, -1 for an unused pick; None for all visible ones.
    Entries reach the queries in one of two ways: all of them for all queries, under a mask, or gathered for each query.
    Masks and gathered entries are made when asked for, never kept.
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

    @property
    def slot_BQZ(self) -> Tensor | None:
        """The selected slots of the chunk's queries if they are to be gathered, else None."""
        if self.selected_BTZ is None or self.entries <= GATHER * self.selected_BTZ.shape[-1]:
            return None
        return self.selected_BTZ[:, self.rows]

    def visible_window(self) -> Tensor:
        """True where query Q sees window token W, [B, Q, W]."""
        key_W = torch.arange(self.window_first, self.last, device=self.layout.position_BT.device)
        query_Q1 = torch.arange(self.first, self.last, device=key_W.device).unsqueeze(-1)
        return (key_W >= self.layout.window_low_BT[:, self.rows].unsqueeze(-1)) & (key_W <= query_Q1)

    def visible_entries(self) -> Tensor:
        """True where query Q sees compressed slot S, [B, Q, entries]; of gathered slots, [B, Q, Z]."""
        assert self.blocks is not None
        low_BQ1 = self.blocks.low_BT[:, self.rows].unsqueeze(-1)
        high_BQ1 = self.blocks.high_BT[:, self.rows].unsqueeze(-1)
        if self.slot_BQZ is not None:
            return (self.slot_BQZ >= low_BQ1) & (self.slot_BQZ < high_BQ1)
        slot_S = torch.arange(self.entries, device=self.layout.position_BT.device)
        visible_BQS = (slot_S >= low_BQ1) & (slot_S < high_BQ1)
        if self.selected_BTZ is None:
            return visible_BQS
        slot_BQZ = self.selected_BTZ[:, self.rows]
        chosen = torch.zeros(*visible_BQS.shape[:2], self.entries + 1, dtype=torch.bool, device=slot_S.device)
        chosen = chosen.scatter(2, slot_BQZ.masked_fill(slot_BQZ < 0, self.entries), True)
        return visible_BQS & chosen[..., : self.entries]

    def of_entries(self, x_BSC: Tensor) -> Tensor:
        """The rows of x that belong to the chunk's entries: a view [B, entries, C], or gathered [B, Q, Z, C]."""
        if self.slot_BQZ is None:
            return x_BSC[:, : self.entries]
        return x_BSC.flatten(0, 1).index_select(0, self._flat(x_BSC.shape[1])).unflatten(0, self.slot_BQZ.shape)

    def add_to_entries(self, total_BSC: Tensor, part: Tensor) -> None:
        """Add to `total` what `of_entries` took from it, in place and in the order of the queries."""
        if self.slot_BQZ is None:
            total_BSC[:, : self.entries] += part
        else:
            total_BSC.view(-1, total_BSC.shape[-1]).index_add_(0, self._flat(total_BSC.shape[1]), part.flatten(0, 2))

    def _flat(self, slots: int) -> Tensor:
        """Gathered slots as rows of a batch of `slots` each; an unused pick takes slot 0, where it is invisible."""
        assert self.slot_BQZ is not None
        row_B11 = torch.arange(self.slot_BQZ.shape[0], device=self.slot_BQZ.device).view(-1, 1, 1)
        return (self.slot_BQZ.clamp_min(0) + row_B11 * slots).flatten()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """One layer's view of a batch: `window` tokens back, and the slots of rate `ratio` (0: none).

    selected_BTZ: the slots to which each query is restricted, int64, each at most once, -1 for an unused pick; None for
    all visible ones.
    """

    layout: Layout
    window: int
    ratio: int
    selected_BTZ: Tensor | None = None

    @property
    def blocks(self) -> Blocks | None:
        """The blocks of the rate, None for a layer with a window only."""
        return self.layout.blocks[self.ratio] if self.ratio else None

    def restricted(self, selected_BTZ: Tensor | None) -> "Sight":
        """The same, of the selected slots only; of all with None."""
        return replace(self, selected_BTZ=selected_BTZ)

    def chunks(self) -> tuple[Chunk, ...]:
        """The row in order. A query can only see the slots complete by the end of its chunk: last // ratio."""
        T, size = self.layout.position_BT.shape[1], max(CHUNK, self.window // 2)
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
