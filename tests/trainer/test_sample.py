"""Proves that a draw has the distribution it should, by enumeration, and that generated text is told whole and once.

And that it is what whole forward passes would write, in a batch as alone.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import AttentionMode, InitConfig
from model.init import initialize
from model.transformer import Transformer
from tests.runs import tiny
from trainer import sample
from trainer.config import SampleConfig
from trainer.sample import draw, generate, uniform

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25], dtype=torch.float64))
GRID = 4000


def shares(temperature: float, top_p: float) -> list[float]:
    """How often each id is drawn when the uniform number takes each of GRID values once."""
    ids = [draw(LOGITS, temperature, top_p, (i + 0.5) / GRID) for i in range(GRID)]
    return [ids.count(i) / GRID for i in range(len(LOGITS))]


# Each id owns one interval of uniform numbers: a grid counts it to within one of its points.
CLOSE = 1.01 / GRID


def test_a_draw_has_the_softmax_distribution() -> None:
    assert shares(1.0, 1.0) == pytest.approx([0.1, 0.4, 0.2, 0.05, 0.25], abs=CLOSE)


def test_the_temperature_divides_the_logits() -> None:
    weights = [p**2 for p in (0.1, 0.4, 0.2, 0.05, 0.25)]
    assert shares(0.5, 1.0) == pytest.approx([weight / sum(weights) for weight in weights], abs=CLOSE)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, {1}),
        (0.39, {1}),
        (0.41, {1, 4}),
        (0.64, {1, 4}),
        (0.66, {1, 4, 2}),
        (0.94, {1, 4, 2, 0}),
        (0.96, {1, 4, 2, 0, 3}),
        (1.0, {1, 4, 2, 0, 3}),
    ],
)
def test_top_p_keeps_the_likeliest_that_reach_it(top_p: float, kept: set[int]) -> None:
    probabilities = [0.1, 0.4, 0.2, 0.05, 0.25]
    total = sum(probabilities[i] for i in kept)
    expected = [probabilities[i] / total if i in kept else 0.0 for i in range(5)]
    found = shares(1.0, top_p)
    assert found == pytest.approx(expected, abs=CLOSE)
    assert {i for i, share in enumerate(found) if share} == kept


def test_temperature_0_takes_the_likeliest() -> None:
    assert {draw(LOGITS, 0.0, top_p, u) for top_p in (0.01, 1.0) for u in (0.0, 0.5, 1 - 2**-53)} == {1}


@pytest.mark.parametrize("uniform_01", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_an_id_that_is_kept(uniform_01: float) -> None:
    logits = torch.tensor([0.0, -torch.inf, 3.0, -800.0])
    assert draw(logits, 1.0, 1.0, uniform_01) in (0, 2)


def test_uniform_numbers_are_a_function_of_seed_row_and_index() -> None:
    places = list(itertools.product((1, 2), (0, 1), range(1000)))
    numbers = [uniform(*place) for place in places]
    assert numbers == [uniform(*place) for place in places]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0
    assert max(numbers) < 1
    # The mean of 4000 independent uniform numbers has a deviation of 0.0046.
    assert math.fsum(numbers) / len(numbers) == pytest.approx(0.5, abs=5 * 0.0046)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """A vocabulary of 256 bytes; 0 begins and 1 ends a document."""

    vocab_size: int = 256
    bos_id: int = 0
    eos_id: int = 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i > 1).decode(errors="replace")


class Parrots:
    """Stands in for decoding: row r is sure of the next byte of text r, and likes an id that is no byte still more."""

    def __init__(self, patch: pytest.MonkeyPatch, texts: Sequence[bytes]) -> None:
        self.device = torch.device("cpu")
        self.texts, self.told, self.steps = texts, 0, 0
        patch.setattr(sample, "prefill", self.prefill)
        patch.setattr(sample, "step", self.step)

    def prefill(self, model: object, token_BT: Tensor, lengths: Sequence[int], **_: Any) -> tuple[None, Tensor]:
        assert token_BT[:, 0].eq(0).all(), "a row begins with bos"
        return None, self.logits()

    def step(self, model: object, cache: None, token_B: Tensor) -> Tensor:
        self.steps += 1
        return self.logits()

    def logits(self) -> Tensor:
        logits_BV = torch.full((len(self.texts), 300), -1000.0)
        for row, text in enumerate(self.texts):
            logits_BV[row, text[self.told] if self.told < len(text) else 65] = 1000.0
        logits_BV[:, 299] = 2000.0
        self.told += 1
        return logits_BV


def pieces(patch: pytest.MonkeyPatch, text: str, prompt: str, tokens: int) -> list[str]:
    config = SampleConfig(tokens=tokens)
    parrots = Parrots(patch, [text.encode() + b"\x01"])
    return [piece.text for piece in generate(parrots, Bytes(), [prompt], config, "dense", seed=1)]


def test_the_text_is_the_prompt_and_what_follows_up_to_the_end_of_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    told = pieces(monkeypatch, "naïve 漢字 😀!", "say ", 100)
    assert told[0] == "say "
    assert "".join(told) == "say naïve 漢字 😀!"
    assert "漢" in told, "a character of several bytes is told when it is whole"


def test_it_ends_after_the_tokens_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "".join(pieces(monkeypatch, "abcdef", "", 3)) == "abc"
    assert "".join(pieces(monkeypatch, "abcdef", "x", 0)) == "x"


def test_rows_of_a_batch_end_each_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parrots = Parrots(monkeypatch, [b"long text\x01", b"no\x01", "é\x01".encode()])
    found = list(generate(parrots, Bytes(), ["a ", "b ", ""], SampleConfig(tokens=100), "dense", seed=1))
    texts = ["".join(piece.text for piece in found if piece.row == row) for row in range(3)]
    assert texts == ["a long text", "b no", "é"]
    assert [piece.row for piece in found if piece.last] == [1, 2, 0]
    assert parrots.steps == len(b"long text"), "no step is made once every row has ended"


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(tiny.model(), torch.float64)
    initialize(model, InitConfig(std=0.5), seed=3)
    return model


def text(model: Transformer, prompts: Sequence[str], mode: AttentionMode, row: int = 0, seed: int = 7) -> str:
    """The text of one row. In float64 no draw is so close to a border that another batch could move it."""
    found = generate(model, Bytes(), prompts, SampleConfig(tokens=40, temperature=1.0), mode, seed)
    return "".join(piece.text for piece in found if piece.row == row)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_decoding_writes_what_whole_forward_passes_write(model: Transformer, mode: AttentionMode) -> None:
    prompt = "some words to begin with"
    ids = [0, *prompt.encode()]
    with torch.no_grad():
        for index in range(40):
            logits_V = model.logits(model(torch.tensor([ids]), mode=mode).h_BTD[:, -1:])[0, 0, :256]
            ids.append(draw(logits_V, 1.0, SampleConfig().top_p, uniform(7, 0, index)))
    assert 1 not in ids
    assert Bytes().decode(ids).startswith(text(model, [prompt], mode)), "an incomplete character at the end is not told"


def test_the_same_seed_row_and_prompt_give_the_same_text(model: Transformer) -> None:
    alone, again = text(model, ["abc"], "sparse"), text(model, ["abc"], "sparse")
    assert alone == again
    assert alone == text(model, ["abc", "a much longer prompt", "x"], "sparse")
    assert alone != text(model, ["abc"], "sparse", seed=8)
    assert alone != text(model, ["x", "abc"], "sparse", row=1)


def test_what_does_not_fit_is_refused_before_anything_is_told(model: Transformer) -> None:
    with pytest.raises(ValueError, match="max_position_embeddings=256 tokens"):
        next(generate(model, Bytes(), ["x"], SampleConfig(tokens=256), "sparse", seed=1))
    assert next(generate(model, Bytes(), ["x"], SampleConfig(tokens=255), "sparse", seed=1)).text == "x"
