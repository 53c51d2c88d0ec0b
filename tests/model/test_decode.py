"""Proves that decoding from the cache equals the whole forward pass at every position, from any split of a row.

The fixtures have every kind of layer: window, CSA with a selection that matters, HCA of rates 8, 16 and 128.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import indexer
from model.config import CSA_RATIO, AttentionMode
from model.decode import prefill, step
from model.names import load_released
from model.transformer import Transformer
from tests.model import golden
from tests.model.mistakes_decode import MISTAKES

LIMIT = 1e-12
"""Logits of size 1 in float64, sums in another order: 2e-14 measured. The mistakes below move some logit by 1e-6."""

GOLDEN_LIMIT = golden.LIMIT
"""The oracle's own distance from the model, whatever path it takes."""

FIXTURES = ("mixed", "nohash", "ratio128")
MODES: tuple[AttentionMode, ...] = ("sparse", "dense")


@cache
def fixture(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Transformer, Tensor]:
    """A model with the ids of its first case."""
    return load_released(folder, dtype), load_file(folder / "io.safetensors")["case0.input_ids"].long()


@cache
def expected(folder: Path, mode: AttentionMode, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits of the whole forward pass."""
    model, token_BT = fixture(folder, dtype)
    with torch.no_grad():
        return model.logits(model(token_BT, mode=mode).h_BTD)


def error(model: Transformer, token_BT: Tensor, want_BTV: Tensor, mode: AttentionMode, first: int, last: int) -> float:
    """Largest difference of logits after a prompt of `first` tokens, and at each position of its continuation."""
    cache, logits_BV = prefill(model, token_BT[:, :first], [first] * len(token_BT), limit=last, mode=mode)
    worst = (logits_BV - want_BTV[:, first - 1]).abs().max()
    for t in range(first, last):
        worst = torch.maximum(worst, (step(model, cache, token_BT[:, t]) - want_BTV[:, t]).abs().max())
    return float(worst)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FIXTURES)
def test_every_position_equals_the_forward_pass(shared: Path, name: str, mode: AttentionMode) -> None:
    folder = shared / "fixtures" / "model" / name
    model, token_BT = fixture(folder)
    assert error(model, token_BT, expected(folder, mode), mode, 1, token_BT.shape[1]) < LIMIT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FIXTURES)
def test_prompts_around_the_borders_of_blocks(shared: Path, name: str, mode: AttentionMode) -> None:
    folder = shared / "fixtures" / "model" / name
    model, token_BT = fixture(folder)
    longest = max(model.config.attention_ratios)
    for first in (3, 4, longest - 1, longest, longest + 2):
        assert error(model, token_BT, expected(folder, mode), mode, first, first + 9) < LIMIT, first


@pytest.mark.parametrize("mode", MODES)
def test_every_split_of_the_golden_document(mode: AttentionMode) -> None:
    """Each with a continuation that ends a block of 8."""
    token_BT, want_BTV = document(mode)
    for first in range(1, token_BT.shape[1] + 1):
        last = min(first + 9, token_BT.shape[1])
        assert error(golden.model(), token_BT, want_BTV, mode, first, last) < GOLDEN_LIMIT, first


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FIXTURES)
def test_every_split(shared: Path, name: str, mode: AttentionMode) -> None:
    """Continued to the end where the row is short or a block of 128 is about to end, else past two blocks of 4."""
    folder = shared / "fixtures" / "model" / name
    model, token_BT = fixture(folder)
    T = token_BT.shape[1]
    for first in range(1, T + 1):
        last = T if T < 100 or first % 128 in (0, 1, 127) else min(first + 9, T)
        assert error(model, token_BT, expected(folder, mode), mode, first, last) < LIMIT, first


@pytest.mark.parametrize("name", FIXTURES)
def test_fp32(shared: Path, name: str) -> None:
    folder = shared / "fixtures" / "model" / name
    model, token_BT = fixture(folder, torch.float32)
    # What the fixtures allow an fp32 run; both sides here are one.
    assert error(model, token_BT, expected(folder, "sparse", torch.float32), "sparse", 5, 40) < 1e-4


def mixed_error(
    model: Transformer, token_1T: Tensor, want_1TV: Tensor, mode: AttentionMode, lengths: tuple[int, ...]
) -> float:
    """Largest difference of logits of prompts of one text, decoded together until the longest has come to its end."""
    token_BT = token_1T.expand(len(lengths), -1)
    T = token_BT.shape[1]
    cache, logits_BV = prefill(model, token_BT[:, : max(lengths)], lengths, limit=T, mode=mode)
    worst = torch.zeros(())
    while True:
        last = [length - 1 for length in cache.lengths]
        worst = torch.maximum(worst, (logits_BV - want_1TV[0, last]).abs().max())
        if max(cache.lengths) == T:
            return float(worst)
        logits_BV = step(model, cache, token_1T[0, list(cache.lengths)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FIXTURES)
def test_rows_of_different_lengths(shared: Path, name: str, mode: AttentionMode) -> None:
    folder = shared / "fixtures" / "model" / name
    model, token_BT = fixture(folder)
    want_BTV = expected(folder, mode)
    longest = max(model.config.attention_ratios)
    lengths = (1, 7, 8, longest, longest + 3)
    first = longest + 20
    assert mixed_error(model, token_BT[:1, :first], want_BTV[:1, :first], mode, lengths) < LIMIT


def test_the_indexers_warm_up_attends_to_everything() -> None:
    model, token_BT = golden.model(), torch.arange(30).unsqueeze(0)
    with torch.no_grad():
        want_BTV = model.logits(model(token_BT, mode="indexer_warmup").h_BTD)
    assert error(model, token_BT, want_BTV, "indexer_warmup", 3, 30) < LIMIT


@contextmanager
def noted(name: str, places: Sequence[object]) -> Iterator[list[Tensor]]:
    """Results of a function of `model.indexer` while it is used, called from the places that hold it."""
    inner, found = getattr(indexer, name), []

    def note(*values: Any) -> Tensor:
        found.append(inner(*values))
        return found[-1]

    with ExitStack() as stack:
        for place in places:
            stack.enter_context(mock.patch.object(place, name, note))
        yield found


@pytest.mark.parametrize("name", FIXTURES)
def test_selections_are_identical(shared: Path, name: str) -> None:
    model, token_BT = fixture(shared / "fixtures" / "model" / name)
    layers = model.config.attention_ratios.count(CSA_RATIO)
    with noted("select", [block.attn for block in model.layers]) as whole, torch.no_grad():
        model(token_BT)
    T = token_BT.shape[1]
    first, choices = max(1, T - 60), 0
    cache, _ = prefill(model, token_BT[:, :first], [first] * len(token_BT), limit=T, mode="sparse")
    for t in range(first, T):
        with noted("top", [indexer]) as now:
            step(model, cache, token_BT[:, t])
        for layer, slot_B1Z in zip(range(layers), now, strict=True):
            for row, slots in enumerate(slot_B1Z[:, 0].tolist()):
                picked = set(whole[layer][row, t].tolist()) - {-1}
                assert set(slots) - {-1} == picked
                choices += len(picked) < (t + 1) // CSA_RATIO
    assert choices > 30, "the selection must leave something out"


def test_a_step_that_overflows_its_cache_is_an_error() -> None:
    model, token_BT = golden.model(), torch.arange(5).unsqueeze(0)
    cache, _ = prefill(model, token_BT, [5], limit=6, mode="dense")
    step(model, cache, token_BT[:, 0])
    with pytest.raises(AssertionError, match="fewer tokens"):
        step(model, cache, token_BT[:, 0])
    with pytest.raises(ValueError, match=r"tokens = \d+: expected prompt and text of at most max_position_embeddings"):
        prefill(model, token_BT, [5], limit=model.config.max_position_embeddings + 1, mode="dense")


def document(mode: AttentionMode) -> tuple[Tensor, Tensor]:
    """The last document of the golden set, of 27 tokens, and the oracle's logits."""
    io = golden.stored()
    inside = io["documents"] == io["documents"].max()
    return io["ids"][inside].unsqueeze(0), io[f"{mode}.logits"][inside].unsqueeze(0)


def wrong() -> float:
    """How far what the golden model, as it is now, decodes is from the oracle: four rows, four lengths, both modes."""
    return max(mixed_error(golden.model(), *document(mode), mode, (1, 6, 8, 9)) for mode in MODES)


@pytest.mark.parametrize("name", ["none", *MISTAKES])
def test_a_mistake_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "none":
        assert wrong() < GOLDEN_LIMIT
        return
    MISTAKES[name].make(monkeypatch)
    assert wrong() > 1e-6
