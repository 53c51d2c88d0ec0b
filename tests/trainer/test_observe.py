"""Proves that a row of metrics tells what its step did in the table's names, and that looking changes nothing."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.batch import Batch
from model.count import training_flops
from model.names import alias_of
from tests.runs import tiny
from tests.trainer import steps
from trainer import metrics, observe
from trainer.build import Built, build
from trainer.config import ObserveConfig
from trainer.observe import Observer
from trainer.schedule import StepPlan
from trainer.validate import HeldOut

PRODUCT_RATE = 4e9
BYTE_COUNT_V = torch.arange(tiny.VOCABULARY) % 3
PLANS = [replace(steps.make_plan(), step=step) for step in range(7)]


def make_built(batch: Batch, every_steps: int = 3) -> Built:
    """Parts of seven equal steps over these rows, of two sources in turn."""
    config = tiny.config(Path("none"), Path("none"), observe=ObserveConfig(every_steps=every_steps))
    stream = SimpleNamespace(rows=lambda segment, first, count: batch, source_names=("a", "b"))
    return replace(build(config, SimpleNamespace(train=stream), steps.CPU), plans=PLANS)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return replace(steps.make_batch(), source_B=torch.tensor([0, 1, 0, 1]))


@pytest.fixture(scope="module")
def built(batch: Batch) -> Built:
    return make_built(batch)


def row_of(built: Built, plan: StepPlan, step_s: float = 0.5) -> dict[str, object]:
    """The row after a step that is said to have taken half a second."""
    held_out = HeldOut(batch=built.parts.stream.rows(0, 0, 4), byte_count_V=BYTE_COUNT_V)
    observer = Observer(built=built, held_out=held_out, product_rate=PRODUCT_RATE)
    with observer.watching(plan) as passes:
        result = steps.take_any(built.parts, plan)
    return observer.row(plan, result, passes, step_s)


def test_speeds_are_per_second_of_the_step(built: Built) -> None:
    row = row_of(built, PLANS[3])
    assert row["speed/tokens_per_s"] == steps.ROWS * steps.LENGTH / 0.5
    flops = steps.ROWS * training_flops(built.config.model, steps.LENGTH, "sparse").total
    assert row["speed/model_flops_per_s"] == flops / 0.5
    assert row["speed/utilisation"] == flops / 0.5 / PRODUCT_RATE


def test_bits_per_byte_are_over_the_bytes_of_the_targets(built: Built, batch: Batch) -> None:
    row = row_of(built, PLANS[3])
    learned = batch.target_BT[batch.target_BT >= 0].tolist()
    num_bytes = sum(token % 3 for token in learned)
    assert row["loss/bits_per_byte"] == pytest.approx(row["loss/lm"] * len(learned) / math.log(2) / num_bytes, 1e-12)


def test_the_losses_by_source_make_up_the_whole(built: Built, batch: Batch) -> None:
    row = row_of(built, PLANS[3])
    targets = [(batch.target_BT[first::2] >= 0).sum().item() for first in (0, 1)]
    whole = row["loss/source/a"] * targets[0] + row["loss/source/b"] * targets[1]
    assert row["loss/lm"] == pytest.approx(whole / sum(targets), 1e-12)


def test_weights_and_biases_are_those_after_the_step(built: Built) -> None:
    before = observe.weight_rms(built.parts)
    row = row_of(built, PLANS[2])
    after = {name: value for name, value in row.items() if name.startswith("optim/weight_rms/")}
    assert after == observe.weight_rms(built.parts)
    assert after.keys() == before.keys() == {f"optim/weight_rms/{group}" for group in built.parts.groups.values()}
    assert after != before
    gates = [block.ffn.gate for block in built.parts.model.blocks()]
    biases = torch.cat([gate.bias for gate in gates if not gate.hashed])
    assert (row["router/bias_min"], row["router/bias_max"]) == (min(biases.tolist()), max(biases.tolist()))


def test_the_rms_of_a_group_is_over_all_its_weights_shared_ones_once() -> None:
    parts = steps.make_parts(steps.make_batch())
    found = observe.weight_rms(parts)
    weights: dict[str, list[float]] = {}
    for name, tensor in parts.model.named_parameters():
        if alias_of(name) is None:
            weights.setdefault(parts.groups[name], []).extend(tensor.flatten().tolist())
    expected = {
        f"optim/weight_rms/{group}": math.sqrt(math.fsum(value**2 for value in values) / len(values))
        for group, values in weights.items()
    }
    # Norms are in fp32, of at most a few thousand numbers each.
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_time_split_is_within_the_step(built: Built) -> None:
    """Threads that wait for the last row are in the step and in none of its parts."""
    row = row_of(built, PLANS[3])
    parts = [row[f"time/{part}_s"] for part in ("wait", "forward", "backward", "reduce", "exchange", "update")]
    assert all(part > 0 for part in parts)


@pytest.mark.parametrize(("every", "due"), [(3, [1, 3, 6, 7]), (1, [1, 2, 3, 4, 5, 6, 7]), (0, []), (9, [1, 7])])
def test_the_dear_ones_come_by_the_number_of_the_step_alone(batch: Batch, every: int, due: list[int]) -> None:
    built = make_built(batch, every)
    rows = [row_of(built, plan) for plan in PLANS]
    for name in ("router/load_LE", "mhc/composite_gain", f"optim/weight_rms/{next(iter(built.parts.groups.values()))}"):
        assert [row["step"] for row in rows if name in row] == due
    for row in rows[: len(due) and 1]:
        load_LE = torch.tensor(row["router/load_LE"])
        assert load_LE.shape == (3, 4)
        counted = (batch.document_BT >= 0).sum()
        assert load_LE.sum(1).tolist()[:2] == [2 * counted] * 2


@pytest.mark.parametrize("mode", ["dense", "indexer_warmup", "sparse"])
def test_every_name_of_a_row_is_in_the_table(built: Built, mode: str) -> None:
    row = row_of(built, replace(PLANS[2], attention=mode))
    assert all(metrics.is_known(name) for name in row)
    assert metrics.scalars(row).keys() < row.keys()


def test_the_names_of_the_table_are_all_made(built: Built) -> None:
    """By the step's row, the loop, or held-out rows; those of formats: tests/trainer/precision/test_health.py."""
    row = row_of(built, PLANS[2])
    times = {f"time/{part}_s" for part in ("run", "check", "save", "observe", "validation")}
    by_loop = times | {"speed/product_flops_per_s"}
    rows = steps.make_batch()
    document_BT, position_BT = torch.zeros_like(rows.token_BT), torch.arange(steps.LENGTH).expand(steps.ROWS, -1)
    long = replace(rows, document_BT=document_BT, position_BT=position_BT)
    validation = HeldOut(batch=long, byte_count_V=BYTE_COUNT_V).measure(built.parts.pool, "sparse")
    assert metrics.METRICS.keys() == {name for name in row if name in metrics.METRICS} | by_loop | validation.keys()
    for family in (name for name in metrics.FAMILIES if not name.startswith(("precision/", "fp4/"))):
        assert any(name.startswith(family.rpartition("/")[0]) for name in row)


def test_looking_changes_no_bit(built: Built) -> None:
    result = steps.take_any(built.parts, PLANS[2])
    before = steps.all_tensors(built.parts)
    held_out = HeldOut(batch=built.parts.stream.rows(0, 0, 4), byte_count_V=BYTE_COUNT_V)
    Observer(built=built, held_out=held_out, product_rate=PRODUCT_RATE).row(PLANS[2], result, [], 1.0)
    assert steps.changed(before, steps.all_tensors(built.parts)) == set()
    assert all(parameter.grad is None for parameter in built.parts.model.parameters())
