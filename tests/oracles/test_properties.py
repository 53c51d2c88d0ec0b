"""Proves what the fixtures do not reach in the oracle: both attention stages, balance and indexer losses, masks, ties,
single equations against hand-computed numbers.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.attention import Blocks
from tests.oracles.basic import part, rope_frequency, rotate, upcast, yarn_ramp
from tests.oracles.cases import documents, random_case
from tests.oracles.compression import compress, index_scores, top_blocks, visible_blocks
from tests.oracles.deepseek_v4 import Layer, Result, forward
from tests.oracles.losses import balance_sum, indexer_sum, losses, total
from tests.oracles.streams import sinkhorn

SMALL = {"compress_ratios": [4, 8, 0], "num_hash_layers": 0, "vocab_size": 23}


def leaves_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.double().requires_grad_() if v.is_floating_point() else v for name, v in weights.items()}


def blocks_of(attention_HTS: Tensor, score_TS: Tensor, visible_TS: Tensor, topk: list[list[int]]) -> Blocks:
    return Blocks(visible_TS=visible_TS, attention_HTS=attention_HTS, index_score_TS=score_TS, index_topk=topk)


def layer_of(index_TK: Tensor, score_TE: Tensor) -> Layer:
    nothing = blocks_of(torch.zeros(1, 1, 0), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.bool), [[]])
    return Layer(
        streams_TND=torch.zeros(1, 1, 1),
        blocks=nothing,
        router_index_TK=index_TK,
        router_score_TE=score_TE,
        hashed=False,
    )


def test_rotation_turns_adjacent_pairs_forward_and_leaves_the_first_channels() -> None:
    x = torch.tensor([[5.0, 1.0, 0.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    turned = rotate(x, torch.tensor([0, 3]), torch.tensor([1.0, 0.1], dtype=torch.float64))
    expected = [5.0, math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)]
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned[1], torch.tensor(expected, dtype=torch.float64))


def test_yarn_ramp_is_that_of_the_released_model() -> None:
    scaling = {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
    ramp = yarn_ramp(scaling, 160000.0, 64)
    # Fact sheet section 1.1: indices up to 15 keep their frequency, from 25 on it is divided by 16, linear between.
    assert ramp[:16].eq(0).all()
    assert ramp[25:].eq(1).all()
    torch.testing.assert_close(ramp[15:26], torch.arange(11) / 10)


def test_window_only_layers_use_the_plain_base_without_yarn() -> None:
    config, _ = random_case(0, rope_scaling=None, compress_rope_theta=500.0)
    scaled = config | {
        "rope_scaling": {"factor": 4, "original_max_position_embeddings": 9, "beta_fast": 2, "beta_slow": 1}
    }
    assert torch.equal(rope_frequency(config, 0), rope_frequency(scaled, 0))
    assert not torch.equal(rope_frequency(config, 8), rope_frequency(scaled, 8))
    assert torch.equal(rope_frequency(scaled, 4), rope_frequency(scaled, 8))
    assert rope_frequency(config, 0).tolist() == torch.tensor([1, 0.1, 0.01, 0.001]).tolist()  # 10000^(-2p/8), in fp32


def test_a_block_is_visible_from_its_last_token_on() -> None:
    counts = visible_blocks(9, 4).sum(dim=1).tolist()
    assert counts == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert visible_blocks(9, 4)[3].tolist() == [True, False]
    assert visible_blocks(3, 4).shape == (3, 0)


def test_top_blocks_takes_the_highest_visible_and_the_earlier_of_equals() -> None:
    score = torch.tensor([[1.0, 9.0, 9.0], [0.0, 0.0, 0.0], [-3.0, -1.0, -2.0]])
    visible = torch.tensor([[True, False, False], [True, True, True], [True, True, True]])
    assert top_blocks(score, visible, 2) == [[0], [0, 1], [1, 2]]


def test_index_scores_are_those_of_the_rotated_queries_and_keys() -> None:
    """The released form, Hadamard rotation and scale included: selections alone do not show the scale, the KL does."""
    config, weights = random_case(4, compress_ratios=[4, 0], num_hash_layers=0)
    indexer = part(upcast(weights), "layers.0.attn.indexer.")
    generator = torch.Generator().manual_seed(1)
    h_TD, qr_TQ = (torch.randn(9, config[k], generator=generator).double() for k in ("hidden_size", "q_lora_rank"))
    frequency_P = rope_frequency(config, 4)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < 16:
        hadamard = torch.cat([torch.cat([hadamard, hadamard]), torch.cat([hadamard, -hadamard])], dim=1)
    key_SC = compress(h_TD, 4, part(indexer, "compressor."), config, frequency_P) @ hadamard * 16**-0.5
    query_TIC = (qr_TQ @ indexer["wq_b.weight"].T).reshape(9, 8, 16)
    query_TIC = rotate(query_TIC, torch.arange(9), frequency_P) @ hadamard * 16**-0.5
    weight_TI = h_TD @ indexer["weights_proj.weight"].T * 16**-0.5 * 8**-0.5
    product_TIS = torch.einsum("tic,sc->tis", query_TIC, key_SC).clamp(min=0)
    expected_TS = torch.einsum("ti,tis->ts", weight_TI, product_TIS)
    torch.testing.assert_close(index_scores(h_TD, qr_TQ, indexer, config, frequency_P), expected_TS)


def test_comb_is_the_transpose_of_the_report_s_matrix() -> None:
    logits = 0.7 * torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    comb = sinkhorn(logits, 20, 1e-6)
    matrix = torch.exp(logits).transpose(1, 2)  # eq. 8: M <- T_r(T_c(M)), columns first
    for _ in range(20):
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
        matrix = matrix / matrix.sum(dim=2, keepdim=True)
    # eps 1e-6 in every denominator of the code, none in the report.
    torch.testing.assert_close(comb.transpose(1, 2), matrix, rtol=0, atol=2e-5)
    assert (comb - matrix).abs().max() > 1e-2
    torch.testing.assert_close(comb.sum(dim=1), torch.ones(5, 4, dtype=torch.float64), rtol=0, atol=2e-6)


def test_balance_sum_by_hand() -> None:
    # Two tokens, three experts, one chosen. Highest scores: experts 2 and 0; f = 3/2 * (1, 0, 1);
    # P = ((1/4 + 1/2) / 2, ., (1/2 + 1/3) / 2). That the bias made both tokens choose expert 1 does not count.
    layer = layer_of(torch.tensor([[1], [1]]), torch.tensor([[1.0, 1.0, 2.0], [3.0, 1.0, 2.0]]))
    assert balance_sum(layer).item() == pytest.approx(2 * 1.5 * (0.375 + 5 / 12))
    score = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.5, 1.0, 3.0]])
    even = layer_of(torch.tensor([[0, 1]] * 3), score)
    assert balance_sum(even).item() == pytest.approx(3.0)  # equal counts: 1 per token whatever the scores
    tie = layer_of(torch.tensor([[2]]), torch.tensor([[1.0, 1.0, 0.5]]))
    assert balance_sum(tie).item() == pytest.approx(3 * 0.4)


def test_indexer_sum_by_hand() -> None:
    attention = torch.tensor([[[0.0, 0.0], [0.3, 0.1]], [[0.0, 0.0], [0.0, 0.4]]], dtype=torch.float64)
    score = torch.tensor([[7.0, 7.0], [0.0, math.log(3.0)]], dtype=torch.float64)
    visible = torch.tensor([[False, False], [True, True]])
    blocks = blocks_of(attention, score, visible, [[], [1]])
    # p = (0.3, 0.5) / 0.8, softmax of the scores = (1/4, 3/4).
    expected = 0.375 * math.log(0.375 / 0.25) + 0.625 * math.log(0.625 / 0.75)
    assert indexer_sum(blocks, "dense").item() == pytest.approx(expected)
    assert indexer_sum(blocks, "sparse").item() == 0.0  # one selected block: nothing to learn
    learned = replace(blocks, index_score_TS=torch.log(attention.sum(dim=0)) + 5.0)
    assert indexer_sum(learned, "dense").item() == pytest.approx(0.0, abs=1e-12)


def run(
    overrides: dict[str, Any], length: int, stage: str = "sparse"
) -> tuple[dict, dict[str, Tensor], list[int], Result]:
    config, weights = random_case(1, **(SMALL | overrides))
    leaves = leaves_of(weights)
    (ids,) = documents(1, [length], config["vocab_size"])
    return config, leaves, ids, forward(config, leaves, ids, stage)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 8])
def test_short_documents(length: int) -> None:
    config, _, ids, result = run({}, length)
    parts = losses(config, result, ids)
    assert result.logits_TV.shape == (length, 23)
    assert result.mtp_logits_TV.shape == (length - 1, 23)
    assert ("mtp" in result.layers) == (length >= 2)
    assert (parts.lm_count, parts.mtp_count) == (length - 1, max(length - 2, 0))
    assert parts.indexer_count == {"0": max(length - 3, 0)}
    assert torch.isfinite(total([parts], mtp_weight=1.0, balance_weight=1.0, indexer_weight=1.0))


@pytest.mark.parametrize("stage", ["sparse", "dense"])
def test_a_token_changes_nothing_before_it(stage: str) -> None:
    config, leaves, ids, result = run({}, 21, stage)
    changed = forward(config, leaves, [*ids[:-1], (ids[-1] + 1) % 23], stage)
    torch.testing.assert_close(changed.logits_TV[:-1], result.logits_TV[:-1], rtol=0, atol=1e-13)
    torch.testing.assert_close(changed.mtp_logits_TV[:-1], result.mtp_logits_TV[:-1], rtol=0, atol=1e-13)
    assert (changed.logits_TV[-1] - result.logits_TV[-1]).abs().max() > 1e-3
    assert (changed.mtp_logits_TV[-1] - result.mtp_logits_TV[-1]).abs().max() > 1e-3


def test_dense_is_sparse_with_every_block_selected() -> None:
    _, _, _, dense = run({"index_topk": 2}, 26, "dense")
    _, _, _, everything = run({"index_topk": 99}, 26)
    _, _, _, few = run({"index_topk": 2}, 26)
    assert torch.equal(dense.logits_TV, everything.logits_TV)
    assert (dense.logits_TV - few.logits_TV).abs().max() > 1e-3
    visible = dense.layers["0"].blocks.visible_TS
    assert torch.equal(dense.layers["0"].blocks.attention_HTS.gt(0).any(dim=0), visible)
    assert few.layers["0"].blocks.attention_HTS.gt(0).any(dim=0).sum(dim=1).max() == 2


@pytest.mark.parametrize("stage", ["sparse", "dense"])
def test_each_parameter_learns_from_its_own_losses(stage: str) -> None:
    config, leaves, ids, result = run({"n_routed_experts": 4}, 22, stage)  # few experts: each is chosen by some token
    parts = losses(config, result, ids)
    names = [name for name, leaf in leaves.items() if leaf.is_floating_point() and not name.endswith("gate.bias")]
    indexer = [name for name in names if ".indexer." in name]
    inputs = [leaves[name] for name in names]
    others = torch.autograd.grad(
        total([parts], mtp_weight=1.0, balance_weight=1.0, indexer_weight=0.0),
        inputs,
        retain_graph=True,
        allow_unused=True,
    )
    divergence = torch.autograd.grad(sum(parts.indexer_sum.values()), inputs, allow_unused=True)
    assert [name for name, g in zip(names, others, strict=True) if g is not None and g.any()] == [
        name for name in names if name not in indexer
    ]
    assert [name for name, g in zip(names, divergence, strict=True) if g is not None and g.any()] == indexer


PROBED = {
    "main": [
        "embed.weight",
        "head.weight",
        "layers.0.attn.attn_sink",
        "layers.0.attn.compressor.ape",
        "layers.1.attn.compressor.wgate.weight",
        "layers.0.ffn.gate.weight",
        "mtp.0.ffn.gate.weight",
        "mtp.0.hc_ffn_fn",
    ],
    "indexer": [
        "layers.0.attn.indexer.wq_b.weight",
        "layers.0.attn.indexer.weights_proj.weight",
        "layers.0.attn.indexer.compressor.ape",
        "layers.0.attn.indexer.compressor.norm.weight",
    ],
}


@pytest.mark.parametrize("kind", ["main", "indexer"])
def test_gradients_are_differences_of_the_loss(kind: str) -> None:
    """Central differences in the dense stage (no block selection to flip); the main model without the KL."""
    config, leaves, ids, result = run({}, 14, "dense")
    weight = {"mtp_weight": 0.3, "balance_weight": 0.5, "indexer_weight": float(kind == "indexer")}
    loss = total([losses(config, result, ids)], **weight)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in PROBED[kind]])
    step = 1e-5  # error of the difference: step^2 times the third derivative, and 1e-15 / step from rounding
    for name, gradient in zip(PROBED[kind], gradients, strict=True):
        entry = int(gradient.abs().argmax())
        values = []
        for sign in (1, -1):
            moved = leaves[name].detach().clone()
            moved.view(-1)[entry] += sign * step
            with torch.no_grad():
                shifted = forward(config, leaves | {name: moved}, ids, "dense")
                values.append(float(total([losses(config, shifted, ids)], **weight)))
        difference = (values[0] - values[1]) / (2 * step)
        assert difference == pytest.approx(float(gradient.view(-1)[entry]), rel=1e-6, abs=1e-9), name


def test_hash_layers_have_no_balance_loss_and_only_csa_layers_an_indexer_loss() -> None:
    config, weights = random_case(3, compress_ratios=[4, 0, 8, 4, 0], num_hash_layers=2)
    (ids,) = documents(3, [5], config["vocab_size"])
    parts = losses(config, forward(config, weights, ids), ids)
    assert list(parts.balance_sum) == list(parts.balance_count) == ["2", "3", "mtp"]
    assert list(parts.indexer_sum) == list(parts.indexer_count) == ["0", "3"]


def test_total_divides_by_all_documents_together() -> None:
    config, weights = random_case(2, **SMALL)
    ids = documents(2, [3, 11, 1], 23)
    parts = [losses(config, forward(config, weights, document), document) for document in ids]
    found = float(total(parts, mtp_weight=2.0, balance_weight=3.0, indexer_weight=5.0))
    lm = sum(float(p.lm_sum) for p in parts) / (2 + 10)
    mtp = sum(float(p.mtp_sum) for p in parts) / (1 + 9)
    balance = sum(float(p.balance_sum[name]) for p in parts for name in ("0", "1")) / (3 + 11 + 1)
    balance += sum(float(p.balance_sum["mtp"]) for p in parts[:2]) / (2 + 10)
    divergence = float(parts[1].indexer_sum["0"]) / (11 - 3)
    assert found == pytest.approx(lm + 2 * mtp + 3 * balance + 5 * divergence, rel=1e-12)


def test_masked_targets_leave_both_cross_entropies_and_nothing_else() -> None:
    config, _, ids, result = run({}, 9)
    whole, targets = losses(config, result, ids), [*ids[1:], 5]
    targets[4] = -1
    masked = losses(config, result, ids, targets)
    logits, mtp_logits = torch.log_softmax(result.logits_TV, 1), torch.log_softmax(result.mtp_logits_TV, 1)
    assert (masked.lm_count, masked.mtp_count) == (8, 7)
    expected = -sum(logits[t, targets[t]] for t in range(9) if t != 4)
    torch.testing.assert_close(masked.lm_sum, expected)
    expected = -sum(mtp_logits[t, targets[t + 1]] for t in range(8) if t != 3)
    torch.testing.assert_close(masked.mtp_sum, expected)
    assert torch.equal(masked.balance_sum["mtp"], whole.balance_sum["mtp"])
    assert torch.equal(masked.indexer_sum["0"], whole.indexer_sum["0"])
