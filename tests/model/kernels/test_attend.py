"""Proves that the kernels of attention equal the plain function: window, ranges of entries, selections; all gradients.

In the interpreter tiles are made tiny, so that every loop has more than one step and a ragged end.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import attend as plain
from model.kernels import attend as kernels
from model.sight import Sight
from tests.model.kernels.sights import selection, sight
from tests.model.kernels.twins import HERE, PLACES, Inputs, Place, apart, mistaken, random

ROWS = [[4, 3], [8]]
CASES = {
    "window": (0, None),
    "all of CSA": (2, None),
    "HCA": (4, None),
    "CSA, selected": (2, 3),
    "CSA, fewer than may be selected": (2, 4),
}


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if HERE.device == "cpu":
        tiles = {"HEADS": 4, "KEYS": 4, "PAIRS": 8, "PROGRAMS": 20, "SHARE_BYTES": 5 * 3 * 6 * 4}
        for name, value in tiles.items():
            monkeypatch.setattr(kernels, name, value)


def inputs(place: Place, seen: Sight, heads: int, channels: int) -> Inputs:
    B, T = seen.layout.position_BT.shape
    made = {
        "q_BTHC": random(place, B, T, heads, channels, scale=2.0),
        "kv_BTC": random(place, B, T, channels, seed=1),
        "sink_H": random(place, heads, seed=2, island=True),
    }
    if 0 < seen.ratio <= T:
        made["entry_BSC"] = random(place, B, T // seen.ratio, channels, seed=3)
    return made


def look(place: Place, case: str, rows: int = 2) -> tuple[Sight, Inputs]:
    """Tiny on the interpreter; on a GPU more than one of the real tiles in each direction."""
    ratio, count = CASES[case]
    if place.device == "cpu":
        seen, heads, channels = sight(ROWS[:rows], 8, 3, ratio, place.device), 3, 6
    else:
        seen, heads, channels = sight([[211, 130], [389]], 389, 70, ratio, place.device), 80, 72
        count = count and 12 * count
    if count:
        seen = seen.restricted(selection(seen, count))
    return seen, inputs(place, seen, heads, channels)


def differ(module: object, seen: Sight, given: Inputs) -> float:
    fixed = {"sight": seen} | ({} if "entry_BSC" in given else {"entry_BSC": None})
    return apart(partial(plain.attend, **fixed), partial(module.attend, **fixed), given)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", PLACES)
def test_attend(place: Place, case: str) -> None:
    assert differ(kernels, *look(place, case)) < place.limit


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_rows_shorter_than_a_block(length: int, selected: bool) -> None:
    seen = sight([[length]], length, 5, 4, HERE.device)
    if selected:
        seen = seen.restricted(torch.zeros(1, length, 0, dtype=torch.int64, device=HERE.device))
    given = inputs(HERE, seen, 2, 8)
    fixed = {"sight": seen, "entry_BSC": given["kv_BTC"][:, :0]}
    assert apart(partial(plain.attend, **fixed), partial(kernels.attend, **fixed), given) < HERE.limit


def test_a_selection_reaches_no_further_than_sight() -> None:
    """Slots of other documents, of later blocks and beyond the row are ignored, as by the plain function."""
    dense = sight(ROWS[:1], 8, 3, 2, HERE.device)
    selected_BTZ = torch.arange(5, device=HERE.device).expand(1, 8, 5)
    assert differ(kernels, dense.restricted(selected_BTZ), inputs(HERE, dense, 2, 8)) < HERE.limit


def test_gradients_of_hidden_keys_are_zero() -> None:
    seen = sight([[4, 3]], 8, 3, 2, HERE.device)
    q, kv, sink, entry = (x.requires_grad_() for x in inputs(HERE, seen, 2, 8).values())
    o_BTHC, _ = kernels.attend(q, kv, entry, sink, seen)
    o_BTHC[:, :4].sum().backward()
    assert kv.grad[:, 4:].abs().max() == 0
    assert entry.grad[:, 2:].abs().max() == 0
    assert entry.grad[:, 1].abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_two_runs_have_the_same_bits(case: str) -> None:
    place = Place(device="cuda", dtype=torch.bfloat16, limit=0.0)
    seen, given = look(place, case)
    twin = partial(kernels.attend, **({"sight": seen} | ({} if seen.ratio else {"entry_BSC": None})))
    assert apart(twin, twin, given) == 0


MISTAKES = {
    "sink left out": ("attend_query", "window", ("tl.full([HEADS], 1.0", "tl.full([HEADS], 0.0")),
    "sum not rescaled": ("attend_query", "window", ("total_H * shrink_H + tl.sum", "total_H + tl.sum")),
    "o not rescaled": ("attend_query", "HCA", ("acc=o_HC * shrink_H[:, None]", "acc=o_HC")),
    "unused picks seen": ("attend_query", "CSA, selected", ("seen_K & (slot_K >= 0)", "seen_K & (slot_K >= -1)")),
    "softmax's mean left out of q": ("attend_query", "window", (" - mean_H[:, None])", ")")),
    "softmax's mean left out of k": ("attend_key", "HCA", (" - mean_R[None, :])", ")")),
    "keys are no values": ("attend_key", "CSA, selected", ("g_RC, acc=grad_KC", "g_RC * 0, acc=grad_KC")),
    "last piece lost": ("attend_key", "window", ("(end - begin + pieces - 1) // pieces", "(end - begin) // pieces")),
    "some picks of a slot lost": ("attend_key", "CSA, selected", ("tl.arange(0, PICKS)", "tl.arange(0, PICKS) * 2")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, case, change = MISTAKES[name]
    monkeypatch.setattr(kernels, file, mistaken(tmp_path, file, change))
    assert differ(kernels, *look(HERE, case, rows=1)) > 100 * HERE.limit


def test_fp64_is_refused() -> None:
    seen = sight([[3]], 3, 2, 0, HERE.device)
    wide: dict[str, Tensor] = {name: x.double() for name, x in inputs(HERE, seen, 2, 8).items()}
    with pytest.raises(TypeError, match="expected fp32 or bf16, found fp64"):
        kernels.attend(**wide, entry_BSC=None, sight=seen)
