"""Oracle: tiny random models of the released format, with every feature on and no parameter at a trivial value.

Everything is a pure function of (seed, name) built from `random.Random` uniforms, which are the same bits on every
machine and in every version; torch's own generators promise neither.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.compression import CSA_RATIO
from tests.oracles.deepseek_v4 import Result

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Tensor name -> (shape, kind of initial values)."""


def random_case(seed: int, **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config (keys of config.json) and its weights (released names, fp32; `tid2eid` int64) drawn from the seed.

    Window-only, CSA and HCA layers in random order, hash and learned routing, MTP; YaRN in half of the seeds. Any key
    can be overridden; with `compress_ratios` the number of layers follows.
    """
    config = random_config(seed)
    config.update(overrides)
    if "compress_ratios" in overrides and "num_hidden_layers" not in overrides:
        config["num_hidden_layers"] = len(config["compress_ratios"]) - config["num_nextn_predict_layers"]
    if config["num_nextn_predict_layers"] == 0 and "compress_ratios" not in overrides:
        config["compress_ratios"] = config["compress_ratios"][: config["num_hidden_layers"]]
    config["num_hash_layers"] = min(config["num_hash_layers"], config["num_hidden_layers"])
    shapes = model_shapes(config)
    return config, {name: draw(seed, name, shape, kind, config) for name, (shape, kind) in shapes.items()}


def random_config(seed: int) -> dict[str, Any]:
    """Sizes drawn from the seed; every number that could be mistaken for another differs from it."""
    pick = Random(f"{seed} config")
    groups = pick.choice([2, 3])
    ratios = [0, CSA_RATIO, pick.choice([8, 16]), CSA_RATIO]
    pick.shuffle(ratios)
    scaling = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 128, "beta_fast": 8, "beta_slow": 1}
    return {
        "model_type": "deepseek_v4",
        "vocab_size": 61,
        "hidden_size": pick.choice([20, 24]),
        "moe_intermediate_size": pick.choice([10, 14]),
        "num_attention_heads": groups * pick.choice([1, 2]),
        "num_key_value_heads": 1,
        "head_dim": pick.choice([12, 18]),
        "qk_rope_head_dim": 8,
        "q_lora_rank": 15,
        "o_groups": groups,
        "o_lora_rank": 7,
        "n_routed_experts": pick.choice([6, 9]),
        "n_shared_experts": 1,
        "num_experts_per_tok": pick.choice([2, 3]),
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": pick.choice([1.5, 2.5]),
        "rope_theta": 10000.0,
        "compress_rope_theta": pick.choice([1000.0, 160000.0]),
        "rope_scaling": pick.choice([scaling, None]),
        "max_position_embeddings": 2048,
        "sliding_window": pick.choice([3, 5, 8]),
        "index_n_heads": 8,
        "index_head_dim": 16,
        "index_topk": pick.choice([2, 3, 4]),
        "hc_mult": pick.choice([2, 3, 4]),
        "hc_sinkhorn_iters": pick.choice([3, 20]),
        "hc_eps": pick.choice([1e-6, 1e-3]),
        "rms_norm_eps": pick.choice([1e-6, 1e-4]),
        "swiglu_limit": pick.choice([0.8, 10.0]),
        "compress_ratios": [*ratios, 0],
        "num_hash_layers": pick.choice([1, 2]),
        "num_hidden_layers": len(ratios),
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
    }


def model_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of the released format for this config: fact sheet section 1.3."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {
        "embed.weight": ((vocab, hidden), "embedding"),
        "head.weight": ((vocab, hidden), "matrix"),
        "norm.weight": ((hidden,), "norm"),
        **head_site_shapes("", config),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= block_shapes(f"layers.{i}.", config["compress_ratios"][i], i < config["num_hash_layers"], config)
    if config["num_nextn_predict_layers"]:
        shapes |= block_shapes("mtp.0.", config["compress_ratios"][-1], False, config)
        shapes |= {f"mtp.0.{name}.weight": ((hidden, hidden), "matrix") for name in ("e_proj", "h_proj")}
        shapes |= {f"mtp.0.{name}.weight": ((hidden,), "norm") for name in ("enorm", "hnorm", "norm")}
        shapes |= head_site_shapes("mtp.0.", config)
    return shapes


def head_site_shapes(prefix: str, config: Mapping[str, Any]) -> Shapes:
    """The mHC site before a head."""
    streams = config["hc_mult"]
    return {
        f"{prefix}hc_head_fn": ((streams, streams * config["hidden_size"]), "matrix"),
        f"{prefix}hc_head_base": ((streams,), "offset"),
        f"{prefix}hc_head_scale": ((1,), "gain"),
    }


def block_shapes(prefix: str, ratio: int, hashed: bool, config: Mapping[str, Any]) -> Shapes:
    """One block: two norms, two mHC sites, attention, experts."""
    hidden, streams = config["hidden_size"], config["hc_mult"]
    rows = 2 * streams + streams * streams
    shapes: Shapes = {f"{prefix}{name}.weight": ((hidden,), "norm") for name in ("attn_norm", "ffn_norm")}
    for site in ("attn", "ffn"):
        shapes[f"{prefix}hc_{site}_fn"] = ((rows, streams * hidden), "matrix")
        shapes[f"{prefix}hc_{site}_base"] = ((rows,), "offset")
        shapes[f"{prefix}hc_{site}_scale"] = ((3,), "gain")
    return shapes | attention_shapes(f"{prefix}attn.", ratio, config) | expert_shapes(f"{prefix}ffn.", hashed, config)


def attention_shapes(prefix: str, ratio: int, config: Mapping[str, Any]) -> Shapes:
    """Attention of one layer, with compressor and indexer where its ratio has them."""
    hidden, heads, channels = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    latent, groups, width = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    shapes: Shapes = {
        "wq_a.weight": ((latent, hidden), "matrix"),
        "q_norm.weight": ((latent,), "norm"),
        "wq_b.weight": ((heads * channels, latent), "matrix"),
        "wkv.weight": ((channels, hidden), "matrix"),
        "kv_norm.weight": ((channels,), "norm"),
        "attn_sink": ((heads,), "offset"),
        "wo_a.weight": ((groups * width, heads * channels // groups), "matrix"),
        "wo_b.weight": ((hidden, groups * width), "matrix"),
    }
    if ratio:
        shapes |= compressor_shapes("compressor.", channels, ratio, hidden)
    if ratio == CSA_RATIO:
        index_heads, index_channels = config["index_n_heads"], config["index_head_dim"]
        shapes["indexer.wq_b.weight"] = ((index_heads * index_channels, latent), "matrix")
        shapes["indexer.weights_proj.weight"] = ((index_heads, hidden), "matrix")
        shapes |= compressor_shapes("indexer.compressor.", index_channels, ratio, hidden)
    return {prefix + name: value for name, value in shapes.items()}


def compressor_shapes(prefix: str, channels: int, ratio: int, hidden: int) -> Shapes:
    """A compressor of entries with that many channels; doubled projections where blocks overlap."""
    width = 2 * channels if ratio == CSA_RATIO else channels
    return {
        f"{prefix}wkv.weight": ((width, hidden), "matrix"),
        f"{prefix}wgate.weight": ((width, hidden), "matrix"),
        f"{prefix}ape": ((ratio, width), "offset"),
        f"{prefix}norm.weight": ((channels,), "norm"),
    }


def expert_shapes(prefix: str, hashed: bool, config: Mapping[str, Any]) -> Shapes:
    """Router, routed experts and the shared expert."""
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    shapes: Shapes = {f"{prefix}gate.weight": ((experts, hidden), "matrix")}
    if hashed:
        shapes[f"{prefix}gate.tid2eid"] = ((config["vocab_size"], config["num_experts_per_tok"]), "experts")
    else:
        shapes[f"{prefix}gate.bias"] = ((experts,), "gate_bias")
    for expert in (*(f"experts.{e}" for e in range(experts)), "shared_experts"):
        shapes[f"{prefix}{expert}.w1.weight"] = ((inner, hidden), "matrix")
        shapes[f"{prefix}{expert}.w3.weight"] = ((inner, hidden), "matrix")
        shapes[f"{prefix}{expert}.w2.weight"] = ((hidden, inner), "matrix")
    return shapes


def draw(seed: int, name: str, shape: tuple[int, ...], kind: str, config: Mapping[str, Any]) -> Tensor:
    """Initial values of one tensor; uniform, so that no value is far out and the scale of every layer stays near 1."""
    source = Random(f"{seed} {name}")
    if kind == "experts":
        chosen = [source.sample(range(config["n_routed_experts"]), shape[1]) for _ in range(shape[0])]
        return torch.tensor(chosen, dtype=torch.int64)
    if kind == "gate_bias":
        # Evenly spaced in random order: distinct, and of the size of the scores' own spread.
        places = source.sample(range(shape[0]), shape[0])
        return torch.tensor([0.4 * place / (shape[0] - 1) - 0.2 for place in places], dtype=torch.float32)
    unit = math.sqrt(3.0)
    middle, deviation = {
        "embedding": (0.0, 1.0),
        "matrix": (0.0, 1.4 / math.sqrt(shape[-1])),
        "norm": (1.0, 0.3),
        "offset": (0.1, 0.8),
        "gain": (0.9, 0.2),
    }[kind]
    low, high = middle - unit * deviation, middle + unit * deviation
    values = [low + (high - low) * source.random() for _ in range(math.prod(shape))]
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def documents(seed: int, lengths: Sequence[int], vocab: int) -> list[list[int]]:
    """Random token ids, one list per document."""
    return [[Random(f"{seed} {d} {t}").randrange(vocab) for t in range(n)] for d, n in enumerate(lengths)]


def write_released(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `weights.safetensors` as the released checkpoints name their contents."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "weights.safetensors")


def router_margin(result: Result, weights: Mapping[str, Tensor]) -> float:
    """Smallest distance between the K-th and the next expert, over learned layers and tokens.

    In the order of score + bias, by which experts are chosen, and in that of the bare score, which the balance loss
    counts. Infinite where every layer is hashed or every expert chosen. A comparison in lower precision needs a margin
    well above that precision's error, or it sees other experts and proves nothing.
    """
    margin = math.inf
    for name, layer in result.layers.items():
        score_TE, chosen = layer.router_score_TE.detach(), layer.router_index_TK.shape[1]
        if layer.hashed or chosen == score_TE.shape[1]:
            continue
        bias_E = weights["mtp.0.ffn.gate.bias" if name == "mtp" else f"layers.{name}.ffn.gate.bias"].detach()
        for key_TE in (score_TE + bias_E, score_TE):
            ranked_TE = key_TE.sort(dim=1, descending=True).values
            margin = min(margin, float((ranked_TE[:, chosen - 1] - ranked_TE[:, chosen]).min()))
    return margin


def indexer_margin(result: Result) -> float:
    """Smallest distance between the last selected and the first unselected visible block's score; infinite if none."""
    margin = math.inf
    for layer in result.layers.values():
        blocks = layer.blocks
        for t, chosen in enumerate(blocks.index_topk or []):
            score_S = blocks.index_score_TS[t].tolist()
            left = [score for s, score in enumerate(score_S) if blocks.visible_TS[t, s] and s not in chosen]
            if left:
                margin = min(margin, min(score_S[s] for s in chosen) - max(left))
    return margin
