"""Proves the packed model against the oracle in both attention stages: outputs, selections, loss sums, all gradients.

The oracle runs the documents one at a time, so agreement is also exact masking. `tests/golden` is one model with every
feature; beside it stand random models, computed by the oracle while the test runs.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from model import losses, sight
from tests.model import golden
from tests.model.observing import build, differences, observe, pack
from tests.oracles.attention import Stage
from tests.oracles.cases import documents, random_case
from tests.oracles.deepseek_v4 import Result, forward
from tests.oracles.losses import losses as oracle_losses
from tests.oracles.losses import total
from tests.oracles.make_golden import LOSS_WEIGHTS, selections, summed

LENGTHS = (3, 9, 18)
"""No block, two CSA blocks and one of HCA, several of both with a rest."""


@pytest.mark.parametrize("stage", golden.STAGES)
def test_the_golden_set_in_a_plain_row(stage: str) -> None:
    found = observe(golden.model(), golden.rows(), golden.STAGES[stage], golden.weights())
    assert not differences(found, golden.expected(stage), golden.LIMIT)


@pytest.mark.parametrize("stage", golden.STAGES)
def test_the_golden_set_padded_and_in_chunks(stage: str) -> None:
    assert not golden.wrong(stage)


def test_the_golden_set_holds_what_the_tests_compare() -> None:
    values = golden.expected("sparse")
    assert {"logits", "mtp_logits", "lm_sum", "mtp_count", "total", "index_topk.1", "router_index.mtp"} <= set(values)
    assert {"balance_sum.mtp", "balance_count.1", "indexer_sum.1", "indexer_count.1"} <= set(values)
    assert sum(name.startswith("grad.") and bool(value.any()) for name, value in values.items()) > 120
    assert golden.expected("dense")["grad.layers.1.attn.indexer.compressor.ape"].any()


def test_the_check_sees_a_small_change_of_any_value() -> None:
    expected = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64), "chosen": torch.tensor([[0, 2]])}
    assert not differences(expected, expected, golden.LIMIT)
    assert differences(expected | {"x": expected["x"] + 1e-10}, expected, golden.LIMIT)
    assert differences(expected | {"x": expected["x"] * torch.nan}, expected, golden.LIMIT)
    assert differences(expected | {"chosen": torch.tensor([[0, 1]])}, expected, golden.LIMIT)
    assert differences({"x": expected["x"]}, expected, golden.LIMIT)


@pytest.mark.parametrize(("seed", "stage"), [(11, "sparse"), (12, "dense"), (13, "sparse"), (14, "dense")])
def test_random_models(seed: int, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight, "CHUNK", 11)
    monkeypatch.setattr(losses, "CHUNK", 7)
    config, weights = random_case(seed)
    ids = documents(seed, LENGTHS, config["vocab_size"])
    rows = pack(ids, padding=2, filler=seed)
    found = observe(build(seed), rows, golden.STAGES[stage], golden.weights())
    expected = by_the_oracle(config, weights, ids, stage)
    assert not differences(found, expected, golden.LIMIT)
    assert not [name for name, g in found.items() if name.startswith("grad.") and name not in expected and g.any()]


def by_the_oracle(
    config: dict[str, Any], weights: dict[str, Tensor], ids: list[list[int]], stage: Stage
) -> dict[str, Tensor]:
    """What the golden set holds and, besides, every layer's streams and all gradients; in the dense stage recall."""
    leaves = {name: v.double().requires_grad_() if v.is_floating_point() else v for name, v in weights.items()}
    results = [forward(config, leaves, document, stage) for document in ids]
    parts = [oracle_losses(config, result, document) for result, document in zip(results, ids, strict=True)]
    loss = total(parts, **LOSS_WEIGHTS)
    loss.backward()
    expected = {
        "logits": torch.cat([r.logits_TV for r in results]),
        "mtp_logits": torch.cat([r.mtp_logits_TV for r in results]),
        "last_hidden": torch.cat([r.last_hidden_TD for r in results]),
        "total": loss,
        **summed(parts),
        **selections(config, results),
        **{f"hidden.{i}": torch.cat([r.layers[i].streams_TND for r in results]) for i in results[0].layers},
        **{f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None},
    }
    for name in results[0].layers if stage == "dense" else ():
        if results[0].layers[name].blocks.index_topk is not None:
            expected[f"recall.{name}"] = recall(results, name, config["index_topk"])
    return {name: value.detach() for name, value in expected.items()}


def recall(results: list[Result], layer: str, topk: int) -> Tensor:
    """(hits, picks) of one layer: selected blocks among the `topk` of highest attention, where more are visible."""
    hits = picks = 0
    for result in results:
        blocks = result.layers[layer].blocks
        for t, chosen in enumerate(blocks.index_topk or []):
            mass_S = blocks.attention_HTS[:, t].sum(0).tolist()
            visible = blocks.visible_TS[t].nonzero().flatten().tolist()
            if len(visible) > topk:
                best = sorted(visible, key=lambda s: -mass_S[s])[:topk]
                hits, picks = hits + len(set(best) & set(chosen)), picks + topk
    return torch.tensor([hits, picks])
