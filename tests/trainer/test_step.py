"""Proves what one optimizer step is: sums over rows in any order, the right denominators, and who may change when."""

import itertools
from dataclasses import replace

import pytest
import torch

from optim.config import OptimConfig
from tests.trainer import step_checks, steps
from tests.trainer.step_checks import BATCH, gradients_of, told
from trainer.config import LossConfig
from trainer.pool import RowPool
from trainer.step import train_step

# sums over rows


def test_the_order_of_the_rows_changes_no_bit() -> None:
    step_checks.check_order_of_rows()


def test_rows_side_by_side_change_no_bit() -> None:
    alone, together = steps.make_parts(BATCH), steps.make_parts(BATCH)
    together = replace(together, pool=RowPool(together.model, 3))
    assert told(steps.take(alone, steps.make_plan())) == told(steps.take(together, steps.make_plan()))
    assert steps.changed(steps.all_tensors(alone), steps.all_tensors(together)) == set()


def test_each_use_of_a_shared_weight_is_a_leaf() -> None:
    step_checks.check_leaves()


def test_gradients_and_losses_are_those_of_all_rows_at_once() -> None:
    step_checks.check_denominators()


def test_padding_and_masked_targets_count_nowhere() -> None:
    padding_BT = BATCH.document_BT < 0
    other = replace(BATCH, token_BT=BATCH.token_BT.masked_fill(padding_BT, 7))
    left, right = steps.make_parts(BATCH, "fp64"), steps.make_parts(other, "fp64")
    results = [steps.take(parts, steps.make_plan()) for parts in (left, right)]
    assert results[0].counts == results[1].counts
    assert results[0].counts.tokens == int((~padding_BT).sum())
    assert results[0].counts.lm == int((BATCH.target_BT >= 0).sum())
    for of_left, of_right in zip(results[0].rows, results[1].rows, strict=True):
        assert torch.equal(of_left.load_LE, of_right.load_LE)
    # fp64: only the order in which an expert's rows are summed may differ.
    assert told(results[0]) == pytest.approx(told(results[1]), rel=1e-13)
    for name, gradient in gradients_of(left).items():
        torch.testing.assert_close(gradients_of(right)[name], gradient, rtol=1e-10, atol=1e-13)


def test_a_row_without_targets_adds_nothing_to_the_head() -> None:
    silent = replace(BATCH, target_BT=torch.full_like(BATCH.target_BT, -1))
    parts = steps.make_parts(silent)
    result = steps.take(parts, steps.make_plan())
    assert (result.counts.lm, result.counts.mtp) == (0, 0)
    assert "loss/mtp" not in told(result)
    assert not gradients_of(parts)["head.weight"].any()


# who may change


def test_warm_up_changes_the_indexer_and_nothing_else() -> None:
    step_checks.check_indexer_warmup()


def test_dense_leaves_the_indexer_alone() -> None:
    parts = steps.make_parts(BATCH)
    before = steps.all_tensors(parts)
    steps.take(parts, steps.make_plan("dense"))
    unchanged = before.keys() - steps.changed(before, steps.all_tensors(parts))
    assert unchanged == steps.of_group(parts, "indexer") | {"layers.0.ffn.gate.tid2eid"}


def test_sparse_trains_everything_and_the_main_model_does_not_feel_the_indexer() -> None:
    parts = [steps.make_parts(BATCH, loss=LossConfig(indexer_weight=weight)) for weight in (0.0, 1.0)]
    before = steps.all_tensors(parts[1])
    for each in parts:
        steps.take(each, steps.make_plan())
    without, with_it = map(gradients_of, parts)
    indexer = {name for name, group in parts[0].groups.items() if group == "indexer"}
    assert steps.changed(without, with_it) == indexer
    assert not any(without[name].any() for name in indexer)
    assert before.keys() - steps.changed(before, steps.all_tensors(parts[1])) == {"layers.0.ffn.gate.tid2eid"}


def test_the_balance_loss_reaches_the_router_only_by_its_weight() -> None:
    parts = [steps.make_parts(BATCH, loss=LossConfig(balance_weight=weight)) for weight in (0.0, 1e-4)]
    results = [steps.take(each, steps.make_plan()) for each in parts]
    without, with_it = map(gradients_of, parts)
    assert told(results[0])["loss/balance"] == told(results[1])["loss/balance"]
    gates = {"layers.1.ffn.gate.weight", "mtp.0.ffn.gate.weight"}
    # What comes after the last router on the way to the loss cannot know its balance.
    assert gates <= steps.changed(without, with_it)
    assert not {"norm.weight", "hc_head_fn", "mtp.0.norm.weight"} & steps.changed(without, with_it)


def test_biases_move_by_the_speed_against_the_load_of_the_whole_step() -> None:
    step_checks.check_bias_rule()


# update


def test_bf16_parameters_are_the_rounding_of_fp32_masters() -> None:
    parts = steps.make_parts(BATCH, "bf16")
    before = steps.all_tensors(parts)
    steps.take(parts, steps.make_plan(rate=1e-6))
    after = steps.all_tensors(parts)
    lower = [name for name, tensor in after.items() if tensor.dtype == torch.bfloat16]
    assert "embed.weight" in lower
    for name in lower:
        master = after[f"optimizer/master/{name}"]
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), after[name])
    changed = steps.changed(before, after)
    # A rate of 1e-6 moves most weights by less than bf16 can show; the masters keep it.
    same = {name for name in lower if name not in changed}
    assert len(same) > len(lower) / 4
    assert {f"optimizer/master/{name}" for name in same} <= changed


def test_the_clip_scales_all_gradients_by_one_factor() -> None:
    parts = steps.make_parts(BATCH, optim=OptimConfig(clip_norm=0.25))
    update = steps.take(parts, steps.make_plan()).update
    gradients = gradients_of(parts)
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).sum().sqrt().item()
    assert update.norm == pytest.approx(norm, rel=1e-14)
    assert update.clip_scale == 0.25 / update.norm
    momenta = {name[9:]: value for name, value in parts.optimizer.state_dict().items() if name.startswith("momentum/")}
    assert len(momenta) > 20
    for name, momentum in momenta.items():
        assert torch.equal(momentum, gradients[name] * update.clip_scale)


def test_a_step_that_is_interrupted_leaves_nothing_behind() -> None:
    parts, undisturbed = steps.make_parts(BATCH), steps.make_parts(BATCH)
    before = steps.all_tensors(parts)
    asked = itertools.count()
    assert train_step(parts, steps.make_plan(), lambda: next(asked) >= 2) is None
    assert steps.changed(before, steps.all_tensors(parts)) == set()
    steps.take(parts, steps.make_plan())
    steps.take(undisturbed, steps.make_plan())
    assert steps.changed(steps.all_tensors(parts), steps.all_tensors(undisturbed)) == set()


def test_numbers_that_are_not_finite_end_the_step_before_it_changes_anything() -> None:
    parts = steps.make_parts(BATCH)
    with torch.no_grad():
        parts.model.norm.weight[0] = torch.inf
    before = steps.all_tensors(parts)
    with pytest.raises(FloatingPointError, match="expected finite values"):
        steps.take(parts, steps.make_plan())
    assert steps.changed(before, steps.all_tensors(parts)) == set()
