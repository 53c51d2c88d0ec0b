"""Proves that the bigram model is what its formula says, against counting pairs in a dictionary."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from trainer import baseline
from trainer.baseline import STRENGTHS, bigram

VOCABULARY = 7


def documents(seed: int) -> list[np.ndarray]:
    """Skewed documents of 0 to 19 tokens; id 6 never occurs."""
    draw = np.random.default_rng(seed)
    return [np.minimum(draw.geometric(0.4, size) - 1, 5).astype(np.int32) for size in draw.integers(0, 20, 30)]


def brute_force(texts: list[np.ndarray], held_out: list[tuple[int, int]], strength: float) -> float:
    """Mean of -log p(b | a) over the held-out pairs, by counting."""
    pairs = Counter(pair for text in texts for pair in pairwise(text.tolist()))
    first = Counter(a for text in texts for a, _ in pairwise(text.tolist()))
    second = Counter(b for text in texts for _, b in pairwise(text.tolist()))
    prior = {b: (second[b] + 1) / (sum(second.values()) + VOCABULARY) for b in range(VOCABULARY)}
    assert math.isclose(sum(prior.values()), 1)
    return math.fsum(-math.log((pairs[a, b] + strength * prior[b]) / (first[a] + strength)) for a, b in held_out) / len(
        held_out
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 50, 4_000_000])
def test_it_is_the_formula_at_the_best_strength(seed: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the documents come in many batches; the held-out pairs have contexts and targets never seen."""
    batches = baseline._batches
    monkeypatch.setattr(baseline, "_batches", lambda texts: batches(texts, size))
    texts = documents(seed)
    draw = np.random.default_rng(seed + 10)
    previous_P, target_P = draw.integers(0, VOCABULARY, (2, 40))
    held_out = list(zip(previous_P.tolist(), target_P.tolist(), strict=True))
    assert 6 in previous_P
    assert 6 in target_P
    expected = {strength: brute_force(texts, held_out, strength) for strength in STRENGTHS}
    found = bigram(iter(texts), previous_P, target_P, VOCABULARY)
    assert found.loss == pytest.approx(min(expected.values()), rel=1e-12)
    assert found.strength == min(expected, key=expected.__getitem__)
    assert found.tokens == sum(map(len, texts))


def test_it_learns_what_follows_what() -> None:
    """In a text of one cycle every token tells the next: the loss on its own pairs goes to 0 with more text."""
    losses = []
    for repeats in (10, 1000):
        text = np.tile(np.arange(5, dtype=np.int32), repeats)
        losses.append(bigram([text], text[:-1], text[1:], VOCABULARY).loss)
    assert losses[1] < losses[0] / 10
    assert losses[1] < 0.01


def test_without_any_text_every_token_is_equally_likely() -> None:
    found = bigram([np.zeros(0, np.int32)], np.array([1, 2]), np.array([3, 3]), VOCABULARY)
    assert found.loss == pytest.approx(math.log(VOCABULARY))
    assert found.tokens == 0
