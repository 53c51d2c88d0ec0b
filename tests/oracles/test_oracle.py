"""Proves the oracle: it agrees with two outside implementations (the fixtures), and `tests/golden` is what it computes.

The fixtures were made by transformers' `deepseek_v4` in float64 and checked by a second implementation; this oracle
was written from the specification alone. Agreement to rounding is therefore agreement of three independent readings.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles.cases import indexer_margin, router_margin
from tests.oracles.deepseek_v4 import Result, forward
from tests.oracles.losses import losses, total
from tests.oracles.make_golden import FOLDER, golden

CASES = [("mixed", k) for k in range(7)] + [("nohash", k) for k in range(4)] + [("ratio128", k) for k in range(4)]
NAMES = ["mixed", "nohash", "ratio128"]

ROUNDING = 1e-12
"""Both sides compute in float64 and differ in the order of sums: 2e-14 measured on logits of size 1."""


@cache
def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Config, weights, io and meta of one fixture."""
    config, meta = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "meta"))
    return config, load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors"), meta


@cache
def first_case(folder: Path) -> tuple[list[Result], dict[str, Tensor]]:
    """Results of case 0 and the gradients of loss + 0.3 mtp_loss, absent for experts that no token chose."""
    config, weights, io, _ = read(folder)
    leaves = {name: v.double().requires_grad_() if v.is_floating_point() else v for name, v in weights.items()}
    ids = io["case0.input_ids"].tolist()
    results = [forward(config, leaves, row) for row in ids]
    parts = [losses(config, result, row) for result, row in zip(results, ids, strict=True)]
    total(parts, mtp_weight=0.3, balance_weight=0.0, indexer_weight=0.0).backward()
    return results, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_and_losses_agree_with_the_fixtures(shared: Path, name: str, case: int) -> None:
    config, weights, io, _ = read(shared / "fixtures" / "model" / name)
    ids = io[f"case{case}.input_ids"].tolist()
    with torch.no_grad():
        results = [forward(config, weights, row) for row in ids]
    parts = [losses(config, result, row) for result, row in zip(results, ids, strict=True)]
    expected = {key.removeprefix(f"case{case}."): v for key, v in io.items() if key.startswith(f"case{case}.")}
    found = {"logits": torch.stack([r.logits_TV for r in results])}
    if "mtp_logits" in expected:
        found["mtp_logits"] = torch.stack([r.mtp_logits_TV for r in results])
    if "loss" in expected:
        found["loss"] = sum(p.lm_sum for p in parts) / sum(p.lm_count for p in parts)
    if "mtp_loss" in expected:
        found["mtp_loss"] = sum(p.mtp_sum for p in parts) / sum(p.mtp_count for p in parts)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=ROUNDING, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_streams_agree_with_the_fixtures(shared: Path, name: str) -> None:
    config, _, io, _ = read(shared / "fixtures" / "model" / name)
    results, _ = first_case(shared / "fixtures" / "model" / name)
    positions = io["hidden_positions"]
    for i in range(config["num_hidden_layers"]):
        streams = torch.stack([r.layers[str(i)].streams_TND[positions] for r in results]).detach()
        # The fixture stores fp32: one rounding, 6e-8 of the value.
        torch.testing.assert_close(streams, io[f"case0.hidden.{i}"].double(), rtol=6e-8, atol=ROUNDING)
    last = torch.stack([r.last_hidden_TD[positions] for r in results]).detach()
    torch.testing.assert_close(last, io["case0.last_hidden"].double(), rtol=6e-8, atol=ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_selections_are_those_of_the_fixtures(shared: Path, name: str) -> None:
    _, _, io, _ = read(shared / "fixtures" / "model" / name)
    results, _ = first_case(shared / "fixtures" / "model" / name)
    for layer in results[0].layers:
        chosen = torch.cat([r.layers[layer].router_index_TK for r in results])
        assert torch.equal(chosen, io[f"case0.router_index.{layer}"].long()), f"experts of layer {layer}"
    indexed = [layer for layer, record in results[0].layers.items() if record.blocks.index_topk is not None]
    assert {f"case0.index_topk.{layer}" for layer in indexed} == {k for k in io if "index_topk" in k}
    for layer in indexed:
        for result, rows in zip(results, io[f"case0.index_topk.{layer}"].tolist(), strict=True):
            selected = [[s for s in row if s >= 0] for row in rows]
            assert result.layers[layer].blocks.index_topk == selected, f"blocks of layer {layer}"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_the_fixtures(shared: Path, name: str) -> None:
    folder = shared / "fixtures" / "model" / name
    expected, (_, gradients) = load_file(folder / "grads.safetensors"), first_case(folder)
    for key, value in expected.items():
        found = gradients[key] if key in gradients else torch.zeros_like(value).double()
        # The fixture's fp64 gradient stored as fp32: half a unit in the last place. Far inside the fixture's own
        # limit of 5 x grad_abs_noise + 1e-6 x largest_grad, which is made for fp32 runs.
        torch.testing.assert_close(found, value.double(), rtol=6e-8, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    assert not [key for key, g in gradients.items() if ".indexer." in key and g.any()], (
        "the indexer got a gradient without the KL"
    )


def test_golden_is_what_the_oracle_computes() -> None:
    config, weights, io = golden()
    assert json.loads((FOLDER / "config.json").read_text()) == config
    stored_weights, stored_io = load_file(FOLDER / "weights.safetensors"), load_file(FOLDER / "io.safetensors")
    assert stored_weights.keys() == weights.keys()
    assert stored_io.keys() == io.keys()
    for name, value in weights.items():
        assert torch.equal(stored_weights[name], value), f"{name}: the weights are the same bits everywhere"
    for name, value in io.items():
        # Another machine may sum in another order.
        torch.testing.assert_close(stored_io[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_golden_selections_are_not_close_calls() -> None:
    config, weights = json.loads((FOLDER / "config.json").read_text()), load_file(FOLDER / "weights.safetensors")
    io = load_file(FOLDER / "io.safetensors")
    for document in io["documents"].unique():
        ids = io["ids"][io["documents"] == document].tolist()
        for stage in ("sparse", "dense"):
            result = forward(config, weights, ids, stage)
            # An fp32 model errs by about 1e-6 here, so that it must choose the same experts and blocks.
            assert router_margin(result, weights) > 2e-4
            assert indexer_margin(result) > 2e-4
