"""Proves that the held-out loss is measured on validation rows, changes nothing, and has its bar from training."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.open import Data
from tests.runs import tiny
from tests.trainer import steps
from trainer.build import read_data
from trainer.pool import RowPool
from trainer.validate import HeldOut, hold_out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("validate")
    return read_data(tiny.config(tiny.write_corpus(folder / "corpus"), folder / "runs"), lambda line: None)


@pytest.fixture(scope="module")
def held_out(data: Data) -> HeldOut:
    return hold_out(data, 3)


def test_the_rows_are_the_first_of_the_validation_split(data: Data, held_out: HeldOut) -> None:
    expected = data.validation.rows(0, 0, 3)
    assert torch.equal(held_out.batch.token_BT, expected.token_BT)
    held = {tuple(document.tolist()) for document in data.validation.documents()}
    assert held
    assert not held & {tuple(document.tolist()) for document in data.train.documents()}


def test_measuring_changes_nothing_and_needs_no_certain_number_of_threads(held_out: HeldOut) -> None:
    parts = steps.make_parts(steps.make_batch())
    before = steps.all_tensors(parts)
    found = [held_out.measure(RowPool(parts.model, threads), "sparse") for threads in (1, 2)]
    assert found[0] == found[1]
    assert steps.changed(before, steps.all_tensors(parts)) == set()
    assert all(parameter.grad is None for parameter in parts.model.parameters())


def test_loss_and_bits_per_byte(data: Data, held_out: HeldOut) -> None:
    """Against torch's own loss, and the bytes of the texts that the targets spell."""
    parts = steps.make_parts(steps.make_batch(), "fp64")
    batch = held_out.batch
    with torch.no_grad():
        output = parts.model(batch.token_BT, batch.document_BT, batch.position_BT, mode="sparse")
        logits_PV = parts.model.logits(output.h_BTD).flatten(0, 1)
    nats = F.cross_entropy(logits_PV, batch.target_BT.flatten(), ignore_index=-1, reduction="sum").item()
    learned = batch.target_BT[batch.target_BT >= 0]
    num_bytes = sum(len(data.tokenizer.decode([token]).encode()) for token in learned.tolist())
    found = held_out.measure(parts.pool, "sparse")
    assert found["validation/loss"] == pytest.approx(nats / len(learned), rel=1e-12)
    assert found["validation/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-12)


def test_the_bigram_model_sees_the_whole_training_split_and_the_same_targets(data: Data, held_out: HeldOut) -> None:
    found = held_out.bigram(data)
    assert found.tokens == sum(len(document) for document in data.train.documents())
    stranger = SimpleNamespace(
        train=SimpleNamespace(documents=lambda: iter([np.zeros(0, np.int32)])), tokenizer=data.tokenizer
    )
    assert held_out.bigram(stranger).loss == pytest.approx(math.log(data.tokenizer.vocab_size))
    assert found.loss < 0.6 * math.log(data.tokenizer.vocab_size)
