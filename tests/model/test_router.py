"""Proves the router: scores, choice, weights, the bias rule that balances, the balance loss and the statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import router
from model.moe import MoE, balance_sum
from model.names import load_released
from model.router import Gate, update_bias
from model.transformer import Transformer
from tests.oracles.make_golden import FOLDER


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> Transformer:
    """Layer 0 is hashed, layers 1 and 2 learned; 5 experts, 2 chosen."""
    return load_released(FOLDER, torch.float64)


def learned_layer(model: Transformer) -> MoE:
    ffn = model.layers[2].ffn
    assert isinstance(ffn, MoE)
    return ffn


def test_scores_at_known_points() -> None:
    logit = torch.tensor([0.0, 30.0, -30.0], dtype=torch.float64, requires_grad=True)
    score = router.scores(logit)
    score.sum().backward()
    # Specification 4.1: 0.833 and slope 0.300 at 0. Above 20 softplus is the identity, far below it is exp.
    assert score.tolist() == pytest.approx([math.sqrt(math.log(2)), math.sqrt(30), math.exp(-15)], rel=1e-12)
    assert logit.grad.tolist() == pytest.approx(
        [0.25 / math.sqrt(math.log(2)), 0.5 / math.sqrt(30), 0.5 * math.exp(-15)], rel=1e-12
    )


@pytest.mark.parametrize("lowest", [-40.0, -100.0, -105.0, -1e4])
def test_a_logit_far_below_zero_gives_no_nan(lowest: float) -> None:
    logit_BTE = torch.tensor([[[lowest, 0.3, lowest]]], requires_grad=True)
    score_BTE = router.scores(logit_BTE)
    weight_BTK = router.route(score_BTE, torch.tensor([[[0, 2]]]), 1.5)
    (weight_BTK.sum() + balance_sum(score_BTE, torch.zeros(1, 1, dtype=torch.int64), 1)).backward()
    assert weight_BTK.isfinite().all()
    assert logit_BTE.grad.isfinite().all()
    assert float(score_BTE[0, 0, 0].detach()) == pytest.approx(math.exp(max(lowest, -80) / 2), rel=1e-5)


def test_a_learned_layer_chooses_by_score_and_bias_and_weighs_by_score(model: Transformer) -> None:
    gate, h_BTD = learned_layer(model).gate, random(3, 20, 12)
    assert isinstance(gate, Gate)
    assert gate.bias.unique().numel() == 5
    with torch.no_grad():
        found = gate(h_BTD, torch.zeros(3, 20, dtype=torch.int64))
    for score_E, expert_K, weight_K in zip(
        found.score_BTE.flatten(0, 1), found.expert_BTK.flatten(0, 1), found.weight_BTK.flatten(0, 1), strict=True
    ):
        best = sorted(range(5), key=lambda e: -float(score_E[e] + gate.bias[e]))[:2]
        assert set(expert_K.tolist()) == set(best)
        expected = model.config.routed_scaling_factor * score_E[expert_K] / score_E[expert_K].sum()
        torch.testing.assert_close(weight_K, expected, rtol=1e-14, atol=0)


def test_a_hash_layer_looks_experts_up_and_learns_their_weights(model: Transformer) -> None:
    gate = model.layers[0].ffn.gate
    token_BT = torch.arange(32).reshape(2, 16)
    found = gate(random(2, 16, 12), token_BT)
    assert torch.equal(found.expert_BTK, gate.tid2eid[token_BT])
    found.weight_BTK[..., 0].sum().backward()
    assert gate.weight.grad.any()
    assert not hasattr(gate, "bias")


def test_chosen_scores_of_zero_give_weights_of_zero() -> None:
    weight = router.route(torch.zeros(1, 1, 4), torch.tensor([[[0, 3]]]), 1.5)
    assert torch.equal(weight, torch.zeros(1, 1, 2))


def test_the_bias_rule() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.25, 0.0])
    update_bias(bias_E, torch.tensor([9, 1, 5, 6]), 0.001)  # mean 5.25
    torch.testing.assert_close(bias_E, torch.tensor([0.499, 0.001, -0.249, -0.001]))
    before = bias_E.clone()
    update_bias(bias_E, torch.tensor([7, 7, 7, 7]), 0.001)
    assert torch.equal(bias_E, before)
    update_bias(bias_E, torch.tensor([9, 1, 5, 6]), 0.0)
    assert torch.equal(bias_E, before)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**50), min_size=2, max_size=9))
def test_the_bias_rule_is_exact_in_integers(load: list[int]) -> None:
    bias_E = torch.zeros(len(load), dtype=torch.float64)
    update_bias(bias_E, torch.tensor(load), 1.0)
    assert bias_E.tolist() == [float((sum(load) > n * len(load)) - (sum(load) < n * len(load))) for n in load]


def test_the_bias_rule_balances_a_skewed_router() -> None:
    score_BTE = router.scores(random(1, 512, 8) + torch.linspace(-2, 2, 8))
    bias_E, worst = torch.zeros(8, dtype=torch.float64), []
    for _ in range(300):
        expert_BTK = torch.topk(score_BTE + bias_E, 2, dim=-1).indices
        load_E = torch.bincount(expert_BTK.flatten(), minlength=8)
        worst.append(float(load_E.max() / load_E.double().mean()))
        update_bias(bias_E, load_E, 0.01)
    assert worst[0] > 2
    assert worst[-1] < 1.1


def test_the_balance_loss_is_that_of_the_report_document_by_document() -> None:
    score_BTE = router.scores(random(2, 9, 5)).requires_grad_()
    document_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, -1], [0, 0, 0, 0, 0, 0, 0, -1, -1]])
    expected = torch.zeros((), dtype=torch.float64)
    for row, documents in zip(score_BTE, document_BT, strict=True):
        for document in range(3):
            score_TE = row[documents == document]
            if len(score_TE):
                top_TK = score_TE.detach().sort(-1, descending=True).indices[:, :2]
                f_E = 5 / (2 * len(score_TE)) * torch.bincount(top_TK.flatten(), minlength=5).double()
                P_E = (score_TE / score_TE.sum(-1, keepdim=True)).mean(0)
                expected = expected + len(score_TE) * (f_E * P_E).sum()
    found = balance_sum(score_BTE, document_BT, 2)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(x, score_BTE)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert not gradients[0][document_BT < 0].any()


def test_balanced_scores_cost_one_per_token() -> None:
    """Its least value, so that balance loss / tokens reads as a factor."""
    score_BTE = 1 + torch.stack([torch.eye(4).roll(1, 0) + torch.eye(4)] * 3)
    assert balance_sum(score_BTE, torch.zeros(3, 4, dtype=torch.int64), 2) == pytest.approx(12)


def test_statistics_count_tokens_of_documents_only(model: Transformer) -> None:
    layer, h_BTD = learned_layer(model), random(1, 11, 12)
    document_BT = torch.tensor([[0] * 6 + [1] * 3 + [-1] * 2])
    token_BT = torch.zeros(1, 11, dtype=torch.int64)
    expert_BTK = layer.gate(h_BTD, token_BT).expert_BTK
    _, statistics = layer(h_BTD, token_BT, document_BT)
    assert torch.equal(statistics.load_E, torch.bincount(expert_BTK[0, :9].flatten(), minlength=5))
    assert statistics.load_E.dtype == torch.int64
    with torch.no_grad():
        layer.gate.weight.zero_()
    _, uniform = layer(h_BTD, token_BT, document_BT)
    assert float(uniform.entropy_sum) == pytest.approx(9 * math.log(5))
    assert not statistics.entropy_sum.requires_grad
    _, hashed = model.layers[0].ffn(h_BTD, token_BT, document_BT)
    assert hashed.balance_sum is None
