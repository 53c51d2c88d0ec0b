"""Where each token of a packed row may look. Every answer is a range, so no [T, T] mask is ever needed.

Documents lie one after the other in a row; positions, windows and block grids restart with each (R 3.4.3).
A block of rate m is complete at the token with position = m - 1 (mod m), and visible from that token on:
block s of a document is visible at position t iff s < floor((t + 1) / m) (spec 3.4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The compressed blocks of one rate m. A row has S = T // m slots; blocks fill them in row order.

    token_BSM: index of each block's tokens in the row. member_BT: slot * m + place in the block of each token, -1 for
    tokens in no block. position_BS: position of its first token in its document.
    has_previous_BS: the slot before holds the block before in the same document.
    low_BT, high_BT: token t sees the slots low <= s < high.
    """

    token_BSM: Tensor
    member_BT: Tensor
    position_BS: Tensor
    has_previous_BS: Tensor
    low_BT: Tensor
    high_BT: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One packed batch: which document and position each token has, first key of its window, blocks by rate.

    document_BT is -1 for padding, which takes part in nothing that is counted.
    """

    document_BT: Tensor
    position_BT: Tensor
    window_low_BT: Tensor
    blocks: dict[int, Blocks]

    @property
    def counted_BT(self) -> Tensor:
        """True where a token belongs to a document, False for padding."""
        return self.document_BT >= 0


def layout(document_BT: Tensor, position_BT: Tensor, window: int, ratios: set[int]) -> Layout:
    """All ranges of a packed batch for one window size and the rates in use (0, window only, is skipped)."""
    index_T = torch.arange(position_BT.shape[1], device=position_BT.device)
    return Layout(
        document_BT=document_BT,
        position_BT=position_BT,
        window_low_BT=index_T - position_BT.clamp(max=window - 1),
        blocks={ratio: _blocks(position_BT, ratio) for ratio in sorted(ratios - {0})},
    )


def _blocks(position_BT: Tensor, m: int) -> Blocks:
    slots = position_BT.shape[1] // m
    ends_BT = (position_BT + 1) % m == 0
    # Stable order puts the tokens that end a block first, in row order; slots beyond them are never visible.
    last_BS = torch.sort(ends_BT.int(), dim=1, descending=True, stable=True).indices[:, :slots]
    exists_BS = ends_BT.gather(1, last_BS)
    first_BS = torch.where(exists_BS, last_BS - (m - 1), 0)
    high_BT = ends_BT.int().cumsum(1)
    position_BS = torch.where(exists_BS, position_BT.gather(1, first_BS), 0)
    # The block a token is in is the next to be complete; it exists if it ends in the row and in the same document.
    slot_BT, place_BT = high_BT - ends_BT.int(), position_BT % m
    index_T = torch.arange(position_BT.shape[1], device=position_BT.device)
    padded_BS = torch.nn.functional.pad(torch.where(exists_BS, first_BS, -m), (0, 1), value=-m)
    inside_BT = padded_BS.gather(1, slot_BT.clamp_max(slots)) == index_T - place_BT
    return Blocks(
        member_BT=torch.where(inside_BT, slot_BT * m + place_BT, -1),
        token_BSM=first_BS.unsqueeze(-1) + torch.arange(m, device=position_BT.device),
        position_BS=position_BS,
        has_previous_BS=position_BS > 0,
        low_BT=high_BT - (position_BT + 1) // m,
        high_BT=high_BT,
    )
