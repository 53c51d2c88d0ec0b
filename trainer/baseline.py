"""A bigram model of the same tokens, fitted on the whole training split: the bar that a trained model must clear."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

STRENGTHS = (1.0, 4.0, 16.0, 64.0, 256.0)
"""Weights of the unigram prior that are tried; the best on the held-out pairs counts, which favours the baseline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bigram:
    """loss: nats per held-out target at the best `strength`; tokens: how many training tokens it was fitted on."""

    loss: float
    strength: float
    tokens: int


def bigram(documents: Iterable[np.ndarray], previous_P: np.ndarray, target_P: np.ndarray, vocabulary: int) -> Bigram:
    """p(b | a) = (count(a b) + strength * p(b)) / (count(a) + strength), p(b) the unigram with one count added to each.

    documents: int arrays of the training split, one per document. previous_P, target_P: the held-out pairs.
    """
    code_U = np.unique(previous_P.astype(np.int64) * vocabulary + target_P)
    pair_U, first_V, single_V = np.zeros(len(code_U)), np.zeros(vocabulary), np.ones(vocabulary)
    tokens = 0
    for batch in _batches(documents):
        tokens += sum(len(document) for document in batch)
        code_P = np.concatenate([_codes(document, vocabulary) for document in batch])
        first_V += np.bincount(code_P // vocabulary, minlength=vocabulary)
        single_V += np.bincount(code_P % vocabulary, minlength=vocabulary)
        code, count = np.unique(code_P, return_counts=True)
        found = np.minimum(np.searchsorted(code, code_U), max(len(code) - 1, 0))
        if len(code):
            pair_U += np.where(code[found] == code_U, count[found], 0)
    at_P = np.searchsorted(code_U, previous_P.astype(np.int64) * vocabulary + target_P)
    single_P = (single_V / single_V.sum())[target_P]
    losses = {
        strength: -np.log((pair_U[at_P] + strength * single_P) / (first_V[previous_P] + strength)).mean()
        for strength in STRENGTHS
    }
    strength = min(losses, key=lambda value: losses[value])
    assert math.isfinite(losses[strength])
    return Bigram(loss=float(losses[strength]), strength=strength, tokens=tokens)


def _codes(document: np.ndarray, vocabulary: int) -> np.ndarray:
    return document[:-1].astype(np.int64) * vocabulary + document[1:]


def _batches(documents: Iterable[np.ndarray], size: int = 4_000_000) -> Iterable[Sequence[np.ndarray]]:
    batch: list[np.ndarray] = []
    held = 0
    for document in documents:
        batch.append(np.asarray(document))
        held += len(document)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
