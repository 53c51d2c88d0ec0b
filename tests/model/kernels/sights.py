"""What the tests of attention's kernels look at: packed rows with padding, and selections of slots."""

import torch
from torch import Tensor

from model import indexer
from model.sight import Chunk, Sight
from model.visibility import layout


def sight(rows: list[list[int]], length: int, window: int, ratio: int, device: str) -> Sight:
    """Rows of documents of these lengths, each filled up with padding to `length`."""
    document, position = [], []
    for lengths in rows:
        padding = length - sum(lengths)
        document.append([d for d, n in enumerate(lengths) for _ in range(n)] + [-1] * padding)
        position.append([t for n in (*lengths, padding) for t in range(n)])
    document_BT, position_BT = (torch.tensor(x, device=device) for x in (document, position))
    return Sight(layout=layout(document_BT, position_BT, window, {ratio}), window=window, ratio=ratio)


def visible(dense: Sight) -> Tensor:
    """True where query T sees slot S, [B, T, S]."""
    assert dense.blocks is not None
    T = dense.layout.position_BT.shape[1]
    row = Chunk(
        first=0,
        last=T,
        window_first=0,
        entries=T // dense.ratio,
        layout=dense.layout,
        blocks=dense.blocks,
        selected_BTZ=None,
    )
    return row.visible_entries()


def selection(dense: Sight, count: int) -> Tensor:
    """Random visible slots, at most `count` for each query, in no order; unused picks among them."""
    seen_BTS = visible(dense)
    draw = torch.Generator().manual_seed(11)
    score_BTS = torch.rand(seen_BTS.shape, generator=draw).to(seen_BTS.device)
    selected_BTZ = indexer.top(score_BTS, seen_BTS, count)
    order_Z = torch.randperm(count, generator=draw).to(seen_BTS.device)
    return selected_BTZ[..., order_Z]
