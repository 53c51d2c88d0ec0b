"""Proves the mHC and clamp measurements on hand-made cases, and that the watch sees what the model does and leaves."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data.batch import Batch
from model import experts, mhc
from model.transformer import Transformer
from tests.runs import tiny
from tests.trainer import steps
from trainer import probe
from trainer.config import Recomputed
from trainer.parallel.recompute import apply_recompute
from trainer.probe import Pass
from trainer.report import health
from trainer.row import pick

BATCH = steps.make_batch()
ROWS = [pick(BATCH, index, steps.CPU) for index in range(2)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights large enough that mixes differ by token."""
    model = steps.make_parts(BATCH, "fp64").model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hc_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def run(model: Transformer, row: Batch = ROWS[0], **options: Any) -> Any:
    """One forward pass."""
    return model(row.token_BT, row.document_BT, row.position_BT, **options)


def watch(model: Transformer, rows: list[Batch] = ROWS, **options: Any) -> list[Pass]:
    """What passes of these rows show."""
    with probe.watched([model]) as passes:
        for row in rows:
            run(model, row, **options)
    return passes


def gains(combs_PNN: list[Tensor]) -> tuple[float, float]:
    """The composite gains of one token or the mean over several, by a pass that these mixes go through."""
    one = Pass()
    for comb_PNN in combs_PNN:
        one.site(comb_PNN.unsqueeze(0), main=True)
    one.inputs(torch.zeros(1), torch.zeros(1), 1.0)
    found = probe.measure([one])
    return found["mhc/composite_gain"], found["mhc/composite_gain_backward"]


def test_rows_and_columns_of_comb() -> None:
    """Two tokens: one doubly stochastic, one whose rows sum to 1 and 1.25 and whose columns to 0.5 and 1.75."""
    comb_PNN = torch.tensor([[[0.25, 0.75], [0.75, 0.25]], [[0.25, 0.75], [0.25, 1.0]]])
    assert probe.stochastic_errors(comb_PNN).tolist() == [0.25, 0.75]
    assert probe.stochastic_errors(comb_PNN[:1]).tolist() == [0.0, 0.0]


def test_the_gain_is_what_a_signal_meets_on_its_way_through_all_sites() -> None:
    """Against the largest growth of any streams of +-1, pushed through the sites as `mhc.expand` does, and back."""
    draw = torch.Generator().manual_seed(1)
    combs = [torch.rand(1, 3, 3, generator=draw, dtype=torch.float64) for _ in range(4)]
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * 3).reshape(1, 8, 3, 1)
    x_BTND = signs.clone().requires_grad_()
    out = x_BTND
    for comb in combs:
        out = mhc.expand(out, torch.zeros(1, 8, 1).double(), torch.zeros(1, 8, 3).double(), comb.expand(1, 8, 3, 3))
    (gradient,) = torch.autograd.grad(out, x_BTND, signs)
    expected = (float(out.detach().abs().max()), float(gradient.abs().max()))
    assert gains(combs) == pytest.approx(expected, rel=1e-12)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3), "the two directions must be told apart"
    assert gains(combs[::-1]) != pytest.approx(expected, rel=1e-3), "and so must the order of the sites"


def test_the_gain_is_a_mean_over_tokens_and_1_for_doubly_stochastic_mixes() -> None:
    identity = torch.eye(2)
    assert gains([torch.stack((identity, 3 * identity))] * 2) == (5.0, 5.0)
    mixed = torch.tensor([[[0.25, 0.75], [0.75, 0.25]]])
    assert gains([mixed] * 5) == (1.0, 1.0)


def test_rows_are_put_together(model: Transformer) -> None:
    """Means over the tokens and inputs of all rows, the largest error of any; in any order the same bits."""
    alone = [probe.measure(watch(model, [row])) for row in ROWS]
    both, swapped = probe.measure(watch(model)), probe.measure(watch(model, ROWS[::-1]))
    assert both == swapped
    for name, value in both.items():
        of_rows = [row[name] for row in alone]
        assert len(set(of_rows)) == 2 or name == "experts/clamped_ratio"
        assert value == pytest.approx(max(of_rows) if name.endswith("error") else sum(of_rows) / 2, rel=1e-12)


def test_the_order_of_rows_changes_no_bit() -> None:
    """With gains whose plain sum depends on the order."""
    passes = []
    for size in (1e16, 1.0, 1.0):
        passes.append(Pass())
        passes[-1].site(size * torch.eye(2).view(1, 1, 2, 2), main=True)
        passes[-1].inputs(torch.zeros(1), torch.zeros(1), 1.0)
    assert sum((1e16, 1.0, 1.0)) != sum((1.0, 1.0, 1e16))
    assert probe.measure(passes) == probe.measure(passes[::-1])


def test_all_sites_of_the_model_are_seen(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two per block, the MTP block's in the sums only; the mixes are those that the streams are expanded with."""
    used: list[Tensor] = []

    def expand(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        used.append(comb.detach()[0])
        return mhc.expand(x, y, post, comb)

    for block in model.blocks():
        monkeypatch.setattr(block, "expand", expand)
    (one,) = watch(model, ROWS[:1])
    assert [comb.shape[0] for comb in used] == [24, 24, 24, 24, 23, 23]
    assert torch.equal(torch.stack(one.errors), torch.stack([probe.stochastic_errors(comb) for comb in used]))
    found = probe.measure([one])
    assert (found["mhc/composite_gain"], found["mhc/composite_gain_backward"]) == gains(used[:4])
    assert found["mhc/row_sum_error"] == max(float(probe.stochastic_errors(comb)[0]) for comb in used)


@pytest.mark.parametrize("mode", ["dense", "indexer_warmup", "sparse"])
def test_columns_are_nearer_to_1_than_rows(model: Transformer, mode: str) -> None:
    """Sinkhorn divides by the columns last; after three rounds rows are visibly off."""
    found = probe.measure(watch(model, mode=mode))
    assert found["mhc/col_sum_error"] < 1e-5 < found["mhc/row_sum_error"] < 1


def test_the_verdict_s_limits_part_what_20_rounds_leave_from_too_few_and_from_the_wrong_axis() -> None:
    """Over very sharp mixes: every 4 x 4 matrix of logits 0 and 40, and random logits of standard deviation 10."""
    corner_PNN = 40.0 * ((torch.arange(2**16).unsqueeze(1) >> torch.arange(16)) & 1).unflatten(1, (4, 4))
    random_PNN = 10 * torch.randn(2**16, 4, 4, generator=torch.Generator().manual_seed(1))
    logits_PNN = torch.cat([corner_PNN, random_PNN])
    row, column = probe.stochastic_errors(mhc.sinkhorn(logits_PNN, 20, 1e-6)).tolist()
    assert 0.08 < row < health.ROW_LOOK
    assert column < 1e-5 < health.COLUMN_LOOK
    too_few = probe.stochastic_errors(mhc.sinkhorn(logits_PNN, 10, 1e-6)).tolist()
    assert too_few[0] > health.ROW_LOOK
    transposed = probe.stochastic_errors(mhc.sinkhorn(logits_PNN, 20, 1e-6).transpose(1, 2)).tolist()
    assert transposed[1] > health.COLUMN_LOOK


@pytest.mark.parametrize("limit", [1e-3, 1e-2, 10.0])
def test_clamped_is_the_share_of_all_inputs(model: Transformer, limit: float) -> None:
    """Against the products of the experts, made again by hand from what reaches them."""
    model, outside, values = copy.deepcopy(model), 0, 0

    def count(gate: Tensor, up: Tensor) -> None:
        nonlocal outside, values
        outside += int((gate > limit).sum() + (up > limit).sum() + (up < -limit).sum())
        values += gate.numel() + up.numel()

    def routed(module: experts.Experts, inputs: tuple[Tensor, Tensor, list[int]], output: Tensor) -> None:
        x_PD, _, counts = inputs
        for x, w1, w3 in zip(x_PD.split(counts), module.w1, module.w3, strict=True):
            count(x @ w1.T, x @ w3.T)

    def shared(module: experts.SharedExpert, inputs: tuple[Tensor], output: Tensor) -> None:
        count(F.linear(inputs[0], module.w1.weight), F.linear(inputs[0], module.w3.weight))

    for module in model.modules():
        if isinstance(module, experts.Experts | experts.SharedExpert):
            module.limit = limit
            module.register_forward_hook(routed if isinstance(module, experts.Experts) else shared)
    found = probe.measure(watch(model))["experts/clamped_ratio"]
    assert values == 2 * (2 * 24 + 23) * (2 + 1) * 2 * tiny.model().moe_intermediate_size
    assert found == outside / values
    assert (found == 0) == (limit == 10.0)


@pytest.mark.parametrize("part", ["attention", "experts", "block"])
def test_what_the_backward_pass_computes_again_is_not_counted_twice(model: Transformer, part: Recomputed) -> None:
    expected = probe.measure(watch(model, ROWS[:1]))
    model = copy.deepcopy(model)
    apply_recompute(model, [part])
    with probe.watched([model]) as passes:
        run(model).h_BTD.sum().backward()
    assert probe.measure(passes) == expected


def seams(model: Transformer) -> Iterator[object]:
    for block in model.blocks():
        yield from (block.enter, block.ffn.experts.swiglu, block.ffn.shared_experts.swiglu)


def test_the_model_is_left_as_it_was(model: Transformer) -> None:
    before = list(seams(model))
    with probe.watched([model]) as passes:
        assert not set(map(id, seams(model))) & set(map(id, before))
        with pytest.raises(IndexError):
            model(ROWS[0].token_BT + tiny.VOCABULARY)
        assert passes == [], "a row that failed shows nothing"
        run(model)
    assert list(seams(model)) == before
    run(model)
    assert len(passes) == 1


def test_what_is_watched_computes_the_same(model: Transformer) -> None:
    def bits() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        output = run(model)
        (output.h_BTD.sum() + output.mtp_h_BTD.sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [output.h_BTD, output.mtp_h_BTD, *gradients]

    plain = bits()
    with probe.watched([model]):
        watched = bits()
    model.zero_grad(set_to_none=True)
    assert len(plain) > 50
    assert all(map(torch.equal, plain, watched))
