"""Oracle: makes the golden set in `tests/golden`, by which anybody can check the model without the large fixtures.

    python -m tests.oracles.make_golden

rewrites it, with the same bits on the same machine. `config.json` and `weights.safetensors` are a released-format
model of 25 thousand parameters with every feature; `io.safetensors` holds, for the documents one after the other:

    ids, documents, targets   int64 [sum T]; targets -1 = nothing learned there; one document ends with a known target
    loss_weights              (mtp, balance, indexer) as `losses.total` takes them
    STAGE.logits              float64 [sum T, V], STAGE = sparse (released behaviour) or dense
    STAGE.mtp_logits          float64 [sum (T - 1), V]
    STAGE.{lm,mtp}_{sum,count}, STAGE.{balance,indexer}_{sum,count}.LAYER, STAGE.total
    STAGE.router_index.LAYER  int64 [sum tokens of the layer, K], ascending
    STAGE.index_topk.LAYER    int64 [sum T, index_topk], ascending, -1 = slot not used
    STAGE.grad.NAME           float64, of the total; in the dense stage the indexer's only
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.attention import Stage
from tests.oracles.cases import documents, random_case, write_released
from tests.oracles.deepseek_v4 import Result, forward
from tests.oracles.losses import Losses, losses, total

FOLDER = Path(__file__).parents[1] / "golden"
SEED = 3
LENGTHS = (1, 2, 5, 13, 27)
LOSS_WEIGHTS = {"mtp_weight": 0.3, "balance_weight": 0.1, "indexer_weight": 1.0}
"""The balance weight is far above the recipe's 1e-4, so that a wrong balance gradient shows."""

CONFIG = {
    "vocab_size": 32,
    "hidden_size": 12,
    "moe_intermediate_size": 8,
    "num_attention_heads": 4,
    "head_dim": 12,
    "q_lora_rank": 10,
    "o_groups": 2,
    "o_lora_rank": 5,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "sliding_window": 4,
    "index_head_dim": 8,
    "index_topk": 2,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-4,
    "rms_norm_eps": 1e-5,
    "swiglu_limit": 1.5,
    "compress_ratios": [0, 4, 8, 0],
    "num_hash_layers": 1,
}


def golden() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Config, weights and contents of `io.safetensors`, computed anew."""
    config, weights = random_case(SEED, **CONFIG)
    ids = documents(SEED, LENGTHS, config["vocab_size"])
    targets = [[*document[1:], -1] for document in ids]
    targets[3][-1] = 7
    targets[4][5:8] = [-1, -1, -1]
    io = {
        "ids": torch.tensor([token for document in ids for token in document]),
        "documents": torch.tensor([d for d, n in enumerate(LENGTHS) for _ in range(n)]),
        "targets": torch.tensor([token for document in targets for token in document]),
        "loss_weights": torch.tensor(list(LOSS_WEIGHTS.values()), dtype=torch.float64),
    }
    for stage in ("sparse", "dense"):
        outputs = run(config, weights, ids, targets, stage)
        io |= {f"{stage}.{name}": value for name, value in outputs.items()}
    return config, weights, io


def run(
    config: dict[str, Any],
    weights: dict[str, Tensor],
    ids: Sequence[list[int]],
    targets: Sequence[list[int]],
    stage: Stage,
) -> dict[str, Tensor]:
    """Everything stored for one attention stage, under the names given above."""
    leaves = {name: v.double().requires_grad_() if v.is_floating_point() else v for name, v in weights.items()}
    results = [forward(config, leaves, document, stage) for document in ids]
    parts = [losses(config, r, i, t) for r, i, t in zip(results, ids, targets, strict=True)]
    loss = total(parts, **LOSS_WEIGHTS)
    loss.backward()
    outputs = {
        "logits": torch.cat([r.logits_TV for r in results]).detach(),
        "mtp_logits": torch.cat([r.mtp_logits_TV for r in results]).detach(),
        "total": loss.detach(),
        **summed(parts),
        **selections(config, results),
    }
    for name, leaf in leaves.items():
        if leaf.grad is not None and (stage == "sparse" or ".indexer." in name):
            outputs[f"grad.{name}"] = leaf.grad
    return outputs


def summed(parts: Sequence[Losses]) -> dict[str, Tensor]:
    """Sums and counts of every loss over all documents."""
    outputs = {}
    for kind in ("lm_sum", "mtp_sum", "lm_count", "mtp_count"):
        outputs[kind] = torch.as_tensor(sum(getattr(p, kind) for p in parts)).detach()
    for kind in ("balance_sum", "balance_count", "indexer_sum", "indexer_count"):
        by_layer = [getattr(p, kind) for p in parts]
        for name in {name: None for layers in by_layer for name in layers}:
            outputs[f"{kind}.{name}"] = torch.as_tensor(sum(x[name] for x in by_layer if name in x)).detach()
    return outputs


def selections(config: dict[str, Any], results: Sequence[Result]) -> dict[str, Tensor]:
    """Chosen experts and selected blocks of every layer."""
    outputs = {}
    for name in results[-1].layers:
        layers = [r.layers[name] for r in results if name in r.layers]
        outputs[f"router_index.{name}"] = torch.cat([layer.router_index_TK for layer in layers])
        if layers[0].blocks.index_topk is not None:
            rows = [row for layer in layers for row in layer.blocks.index_topk]
            width = config["index_topk"]
            outputs[f"index_topk.{name}"] = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])
    return outputs


def main() -> None:
    """Rewrite the golden folder."""
    config, weights, io = golden()
    write_released(FOLDER, config, weights)
    save_file(io, FOLDER / "io.safetensors")


if __name__ == "__main__":
    main()
