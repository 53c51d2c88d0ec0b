"""Proves that a draw has the distribution it should, by enumeration, and that generated text is told whole and once."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

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


def test_uniform_numbers_are_a_function_of_seed_and_index() -> None:
    numbers = [uniform(seed, index) for seed in (1, 2) for index in range(2000)]
    assert numbers == [uniform(seed, index) for seed in (1, 2) for index in range(2000)]
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


class Parrot:
    """A model that is sure of the next byte of a text, and likes an id that the tokenizer does not have still more."""

    def __init__(self, text: bytes, beginning: int) -> None:
        self.embed = SimpleNamespace(weight=torch.zeros(1))
        self.text, self.beginning = text, beginning

    def __call__(self, token_BT: Tensor, mode: str) -> SimpleNamespace:
        return SimpleNamespace(h_BTD=token_BT.unsqueeze(-1).expand(-1, -1, token_BT.shape[1]))

    def logits(self, h_BTD: Tensor) -> Tensor:
        logits_V = torch.full((300,), -1000.0)
        logits_V[self.text[h_BTD.shape[-1] - self.beginning]] = 1000.0
        logits_V[299] = 2000.0
        return logits_V.expand(1, 1, -1)


def pieces(text: str, prompt: str, tokens: int) -> list[str]:
    beginning = len(prompt.encode()) + 1
    config = SampleConfig(prompt=prompt, tokens=tokens)
    return list(generate(Parrot(text.encode() + b"\x01", beginning), Bytes(), config, "dense", seed=1))


def test_the_text_is_the_prompt_and_what_follows_up_to_the_end_of_the_document() -> None:
    told = pieces("naïve 漢字 😀!", "say ", 100)
    assert told[0] == "say "
    assert "".join(told) == "say naïve 漢字 😀!"
    assert "漢" in told, "a character of several bytes is told when it is whole"


def test_it_ends_after_the_tokens_asked_for() -> None:
    assert "".join(pieces("abcdef", "", 3)) == "abc"
    assert "".join(pieces("abcdef", "x", 0)) == "x"
