"""Proves the mHC and clamp measurements on hand-made cases, and that the watch sees what the model does and leaves."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import experts, mhc
from model.transformer import Transformer
from tests.runs import tiny
from tests.trainer import steps
from trainer import probe
from trainer.row import pick

BATCH = steps.make_batch()
ROW = pick(BATCH, 1, steps.CPU)
"""With padding at its end."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights large enough that mixes differ by token."""
    model = steps.make_parts(BATCH, "fp64").model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hc_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


@pytest.fixture(params=["dense", "indexer_warmup", "sparse"])
def found(model: Transformer, request: pytest.FixtureRequest) -> dict[str, float]:
    return probe.measure(model, ROW, request.param)


def test_rows_and_columns_of_comb() -> None:
    """Two tokens: one doubly stochastic, one whose rows sum to 1 and 1.25 and whose columns to 0.5 and 1.75."""
    comb_PNN = torch.tensor([[[0.25, 0.75], [0.75, 0.25]], [[0.25, 0.75], [0.25, 1.0]]])
    assert probe.stochastic_errors(comb_PNN) == (0.25, 0.75)
    assert probe.stochastic_errors(comb_PNN[:1]) == (0.0, 0.0)


def test_the_gain_is_what_a_signal_meets_on_its_way_through_all_sites() -> None:
    """Against the largest growth of any streams of +-1, pushed through the sites as `mhc.expand` does, and back."""
    draw = torch.Generator().manual_seed(1)
    combs = [torch.rand(1, 3, 3, generator=draw, dtype=torch.float64) for _ in range(4)]
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * 3)
    x_BTND = signs.reshape(1, 8, 3, 1).requires_grad_()
    out = x_BTND
    for comb in combs:
        out = mhc.expand(out, torch.zeros(1, 8, 1).double(), torch.zeros(1, 8, 3).double(), comb.expand(1, 8, 3, 3))
    (gradient,) = torch.autograd.grad(out, x_BTND, signs.reshape(1, 8, 3, 1))
    expected = (float(out.detach().abs().max()), float(gradient.abs().max()))
    assert probe.composite_gains(combs) == pytest.approx(expected, rel=1e-12)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3), "the two directions must be told apart"
    assert probe.composite_gains(combs[::-1]) != pytest.approx(expected, rel=1e-3), "and so must the order of the sites"


def test_the_gain_is_a_mean_over_tokens_and_1_for_doubly_stochastic_mixes() -> None:
    identity = torch.eye(2)
    assert probe.composite_gains([torch.stack((identity, 3 * identity))] * 2) == (5.0, 5.0)
    mixed = torch.tensor([[[0.25, 0.75], [0.75, 0.25]]])
    assert probe.composite_gains([mixed] * 5) == (1.0, 1.0)


def test_all_sites_of_the_model_are_seen(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two per block in order of depth, the MTP block last; the mixes are those that the streams are expanded with."""
    used: list[Tensor] = []

    def expand(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        used.append(comb)
        return mhc.expand(x, y, post, comb)

    for block in model.blocks():
        monkeypatch.setattr(block, "expand", expand)
    with torch.no_grad(), probe.watched(model) as seen:
        model(ROW.token_BT, ROW.document_BT, ROW.position_BT)
    assert len(used) == len(seen.combs_BTNN) == 6
    assert all(torch.equal(comb, its) for comb, its in zip(used, seen.combs_BTNN, strict=True))
    assert [comb.shape[1] for comb in used] == [24, 24, 24, 24, 23, 23]


def test_padding_and_the_mtp_block_do_not_count_where_they_should_not(model: Transformer) -> None:
    found = probe.measure(model, ROW, "dense")
    with torch.no_grad(), probe.watched(model) as seen:
        model(ROW.token_BT, ROW.document_BT, ROW.position_BT, mode="dense")
    filled = int((ROW.document_BT >= 0).sum())
    assert 0 < filled < steps.LENGTH
    combs = [comb[0, :filled] for comb in seen.combs_BTNN]
    gains = probe.composite_gains(combs[:4])
    assert (found["mhc/composite_gain"], found["mhc/composite_gain_backward"]) == gains
    assert gains != probe.composite_gains(combs)
    assert gains != probe.composite_gains([comb[0] for comb in seen.combs_BTNN[:4]])
    errors = [probe.stochastic_errors(comb) for comb in combs]
    expected = {"mhc/row_sum_error": max(row for row, _ in errors), "mhc/col_sum_error": max(col for _, col in errors)}
    assert expected.items() <= found.items()


def test_columns_are_nearer_to_1_than_rows(found: dict[str, float]) -> None:
    """Sinkhorn divides by the columns last; after three rounds rows are visibly off."""
    assert found["mhc/col_sum_error"] < 1e-5 < found["mhc/row_sum_error"] < 1


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
    found = probe.measure(model, ROW, "sparse")["experts/clamped_ratio"]
    assert values == (2 * 24 + 23) * (2 + 1) * 2 * tiny.model().moe_intermediate_size
    assert found == outside / values
    assert (found == 0) == (limit == 10.0)


def seams(model: Transformer) -> Iterator[object]:
    for block in model.blocks():
        yield from (block.enter, block.ffn.experts.swiglu, block.ffn.shared_experts.swiglu)


def test_the_model_is_left_as_it_was(model: Transformer) -> None:
    before = list(seams(model))
    probe.measure(model, ROW, "sparse")
    assert list(seams(model)) == before
    with probe.watched(model):
        assert not set(map(id, seams(model))) & set(map(id, before))
        # A row that the model cannot run: the seams are put back after an error, too.
        with pytest.raises(IndexError), probe.watched(model):
            model(ROW.token_BT + tiny.VOCABULARY)
    assert list(seams(model)) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_watched_computes_the_same(model: Transformer) -> None:
    arguments = (ROW.token_BT, ROW.document_BT, ROW.position_BT)
    with torch.no_grad():
        plain = model(*arguments)
        with probe.watched(model):
            watched = model(*arguments)
    assert torch.equal(plain.h_BTD, watched.h_BTD)
    assert torch.equal(plain.mtp_h_BTD, watched.mtp_h_BTD)
