"""Proves that the kernel of the compressor's pooling equals the plain function, for packed rows of every raggedness."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import compressor
from model.kernels import pool
from model.visibility import Blocks, layout
from tests.model.kernels.twins import HERE, PLACES, Function, Inputs, Place, apart, mistaken, random

DOCUMENTS = {
    "one": [[16], [16]],
    "ragged": [[3, 9, 1, 6], [8, 4, 4, 3]],
    "tokens in no block": [[7, 7, 5], [1, 2, 16]],
    "no block in a row": [[3] * 6 + [1], [19]],
}


def blocks(place: Place, lengths: list[list[int]], M: int) -> Blocks:
    position = torch.tensor([[t for length in row for t in range(length)] for row in lengths])
    document = torch.tensor([[d for d, length in enumerate(row) for _ in range(length)] for row in lengths])
    return layout(document.to(place.device), position.to(place.device), 4, {M}).blocks[M]


def operands(place: Place, where: Blocks, C: int, overlap: bool) -> Inputs:
    B, T = where.member_BT.shape
    M, width = where.token_BSM.shape[2], 2 * C if overlap else C
    shapes = {"value_BTC": (B, T, width), "logit_BTC": (B, T, width), "ape_MC": (M, width)}
    return {name: random(place, *shape, seed=i, island=True) for i, (name, shape) in enumerate(shapes.items())}


def used(where: Blocks) -> Tensor:
    """True for the slots that hold a block, [B, S]: of the others nobody uses anything."""
    M = where.token_BSM.shape[2]
    counts = (where.member_BT >= 0).sum(1, keepdim=True) // M
    return torch.arange(where.token_BSM.shape[1], device=counts.device) < counts


def distance(
    place: Place, lengths: list[list[int]], M: int, C: int, overlap: bool, twin: Function = pool.pool
) -> float:
    where = blocks(place, lengths, M)
    fixed = {"blocks": where, "overlap": overlap}
    return apart(
        partial(compressor.pool, **fixed),
        partial(twin, **fixed),
        operands(place, where, C, overlap),
        lambda weight_BSC: weight_BSC * used(where).unsqueeze(-1),
    )


@pytest.mark.parametrize(("M", "C", "overlap"), [(4, 6, True), (4, 8, False), (5, 3, False), (3, 4, True)])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("place", PLACES[:2])
def test_packed_rows(place: Place, documents: str, M: int, C: int, overlap: bool) -> None:
    assert distance(place, DOCUMENTS[documents], M, C, overlap) < place.limit


@pytest.mark.parametrize(("M", "C", "overlap"), [(4, 6, True), (16, 5, False)])
def test_more_blocks_and_channels_than_a_tile(M: int, C: int, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "ELEMENTS", 16)
    monkeypatch.setattr(pool, "CHUNK", 3)
    assert distance(HERE, [[30, 18, 3], [16, 32, 3]], M, C, overlap) < HERE.limit


MISTAKES = {
    "ape left out": ("mask=mask, other=0.0) + ape", "mask=mask, other=0.0) + 0 * ape"),
    "the other series": ("row % M, tl.where(row >= M, C, 0)\n\n", "row % M, tl.where(row >= M, 0, C)\n\n"),
    "a block before where there is none": ("(tl.load(previous_ptr + block) != 0)", "(block > 0)"),
    "logit's gradient without the mean": ("grad * (value - tl.sum(weight * value, 0)[None, :])", "grad * value"),
    "slots without a block write": ("(member == slot % S * M + place)", "(member < T)"),
    "the last block again": (" & (number < blocks)", ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    wrong = mistaken(tmp_path, "pool", MISTAKES[name])
    assert distance(HERE, [[3, 9, 1, 7], [8, 4, 4, 4]], 4, 6, True, wrong.pool) > 100 * HERE.limit
