"""Proves that the random cases are functions of their seed, have every feature, and that the margins are true."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles.cases import documents, indexer_margin, random_case, router_margin, write_released
from tests.oracles.deepseek_v4 import Result, forward
from tests.oracles.losses import losses


def test_random_cases_are_functions_of_the_seed_with_every_feature(tmp_path: Path) -> None:
    config, weights = random_case(5)
    again, same = random_case(5)
    assert config == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    other_config, other = random_case(6, **{k: v for k, v in config.items() if k != "model_type"})
    assert config == other_config
    assert not any(torch.equal(weights[name], other[name]) for name in weights)
    assert {0, 4} < set(config["compress_ratios"][:-1])
    for name, value in weights.items():
        if name.endswith("gate.bias"):
            assert len(value.unique()) == len(value)
        if name.endswith("tid2eid"):
            assert all(len(set(row)) == config["num_experts_per_tok"] for row in value.tolist())
        else:
            assert value.ne(0).all(), name
            assert value.numel() == 1 or value.std() > 0, name
    write_released(tmp_path / "case", config, weights)
    assert json.loads((tmp_path / "case" / "config.json").read_text()) == config
    read = load_file(tmp_path / "case" / "weights.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_a_case_without_mtp_has_no_mtp_tensors() -> None:
    config, weights = random_case(7, num_nextn_predict_layers=0)
    assert len(config["compress_ratios"]) == config["num_hidden_layers"]
    assert not [name for name in weights if name.startswith("mtp.")]
    result = forward(config, weights, [1, 2, 3])
    assert "mtp" not in result.layers
    assert losses(config, result, [1, 2, 3]).mtp_count == 0


def test_margins_are_the_distance_to_another_selection() -> None:
    config, weights = random_case(1, compress_ratios=[4, 8, 0], num_hash_layers=0, index_topk=2)
    (ids,) = documents(1, [17], config["vocab_size"])
    with torch.no_grad():
        result = forward(config, weights, ids)
    router, indexer = router_margin(result, weights), indexer_margin(result)
    assert router == pytest.approx(min(brute_router_margin(result, weights)), rel=1e-12)
    blocks = result.layers["0"].blocks
    gaps = []
    for t in range(11, 17):
        ranked = sorted(blocks.index_score_TS[t][blocks.visible_TS[t]].tolist(), reverse=True)
        gaps.append(ranked[1] - ranked[2])
    assert indexer == pytest.approx(min(gaps), rel=1e-12)


def brute_router_margin(result: Result, weights: dict[str, Tensor]) -> list[float]:
    """How far the best expert left out lies below the worst one taken, by both orders, for every token and layer."""
    gaps = []
    for name, layer in result.layers.items():
        bias = weights["mtp.0.ffn.gate.bias" if name == "mtp" else f"layers.{name}.ffn.gate.bias"]
        for score, index in zip(layer.router_score_TE, layer.router_index_TK.tolist(), strict=True):
            key = (score + bias).tolist()
            left_out = [key[e] for e in range(len(key)) if e not in index]
            gaps.append(min(key[e] for e in index) - max(left_out))
            bare = sorted(score.tolist())
            gaps.append(bare[-len(index)] - bare[-len(index) - 1])
    return gaps
