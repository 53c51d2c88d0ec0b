"""Proves that the indexer's kernel selects exactly the plain function's slots, of equal scores the earlier ones."""

from pathlib import Path

import pytest
import torch

from model import indexer as plain
from model.indexer import Index
from model.kernels import indexer as kernels
from model.sight import Sight
from tests.model.kernels.sights import sight
from tests.model.kernels.twins import HERE, PLACES, Place, mistaken, random


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of queries and slots, several turns, each with a ragged end."""
    if HERE.device == "cpu":
        for name, value in {"QUERIES": 4, "SLOTS": 2, "KEY_BYTES": 6 * 8 * 5}.items():
            monkeypatch.setattr(kernels, name, value)


def seen(device: str) -> Sight:
    if device == "cpu":
        return sight([[5, 4], [11]], 11, 3, 2, device)
    return sight([[211, 800], [1021]], 1021, 70, 2, device)


def index(place: Place, look: Sight, heads: int, channels: int, *, whole: bool) -> Index:
    """Random queries and keys; `whole` numbers make many scores exactly equal, many of them zero of either sign."""
    B, T = look.layout.position_BT.shape
    drawn = [random(place, B, T, heads, channels), random(place, B, T // look.ratio, channels, seed=1)]
    weight = random(place, B, T, heads, seed=2, island=True)
    if whole:
        drawn, weight = [x.sign() * (x.abs() > 0.8) for x in drawn], weight.sign()
    return Index(q_BTIJ=drawn[0], k_BSJ=drawn[1], w_BTI=weight)


def same(module: object, given: Index, topk: int, look: Sight) -> bool:
    expected, found = plain.select(given, topk, look), module.select(given, topk, look)
    return found.dtype == torch.int64 and torch.equal(found.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("topk", [2, 100])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_select(place: Place, whole: bool, topk: int) -> None:
    """Random numbers in bf16 too: their products are exact, and scores in fp32 are rarely as close as its rounding."""
    look = seen(place.device)
    assert same(kernels, index(place, look, 3, 6, whole=whole), topk, look)


def test_rows_shorter_than_a_block() -> None:
    look = sight([[3]], 3, 5, 4, HERE.device)
    assert kernels.select(index(HERE, look, 2, 8, whole=False), 2, look).shape == (1, 3, 0)


def test_best_first() -> None:
    look = seen(HERE.device)
    given = index(HERE, look, 2, 8, whole=False)
    selected_BTZ = kernels.select(given, 3, look)
    score_BTS = plain.scores(given.q_BTIJ, given.k_BSJ, given.w_BTI)
    score_BTZ = score_BTS.gather(-1, selected_BTZ.clamp_min(0)).masked_fill(selected_BTZ < 0, -torch.inf)
    # Equal but for the rounding of sums in another order.
    assert (score_BTZ[..., 1:] <= score_BTZ[..., :-1] + 1e-5).all()


MISTAKES = {
    "negative scores the wrong way round": [("bits_S ^ ((bits_S >> 31) & 0x7FFFFFFF)", "bits_S")],
    "the later of equal ones": [("(0x7FFFFFFF - slot_S)", "slot_S"), ("0x7FFFFFFF - (best_QZ &", "(best_QZ &")],
    "no relu": [('tl.maximum(tl.dot(q_IJ, k_JS, input_precision="ieee"), 0.0)', "tl.dot(q_IJ, k_JS)")],
    "other documents' blocks": [("(slot_S >= low) & (slot_S < high)", "(slot_S >= 0) & (slot_S < high)")],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    wrong, look = mistaken(tmp_path, "indexer", *MISTAKES[name]), seen(HERE.device)
    cases = [index(HERE, look, 3, 6, whole=whole) for whole in (False, True)]
    assert all(same(kernels, given, 2, look) for given in cases)
    assert not all(same(wrong, given, 2, look) for given in cases)
