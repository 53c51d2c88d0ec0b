"""transformers' `deepseek_v4` with the weights of our model, for benchmarks that hold the two side by side.

It is a dependency of the tests, not of training: `./keel test` installs it.
"""

import json
from typing import Any

import torch
from torch import Tensor

from model.names import tensors
from model.transformer import Transformer
from trainer.released.keys import config_text

VERSION = "5.23.0"
"""The release whose names are written here."""

_NAMES = (
    ("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight"),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.wkv", "self_attn.compressor.kv_proj"),
    ("attn.compressor.wgate", "self_attn.compressor.gate_proj"),
    ("attn.indexer.compressor.norm.weight", "self_attn.compressor.indexer.kv_norm.weight"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj"),
    ("attn.indexer.compressor.wgate", "self_attn.compressor.indexer.gate_proj"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.wq_a", "self_attn.q_a_proj"),
    ("attn.q_norm", "self_attn.q_a_norm"),
    ("attn.wq_b", "self_attn.q_b_proj"),
    ("attn.wkv", "self_attn.kv_proj"),
    ("attn.kv_norm", "self_attn.kv_norm"),
    ("attn.wo_a", "self_attn.o_a_proj"),
    ("attn.wo_b", "self_attn.o_b_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate", "mlp.gate"),
    ("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
    ("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
    ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
    ("ffn.experts.w2", "mlp.experts.down_proj"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("hc_head_", "model.hc_head.hc_"),
    ("embed.", "model.embed_tokens."),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
)


def build(model: Transformer) -> Any:
    """DeepseekV4ForCausalLM of the same sizes and weights, without our MTP branch; ImportError without transformers."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    keys = json.loads(config_text(model.config, "fp32", None))
    theirs = DeepseekV4ForCausalLM(DeepseekV4Config(**keys))
    theirs.load_state_dict(_weights(model), strict=True)
    return theirs.train()


def _weights(model: Transformer) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors(model).items():
        if not name.endswith(("experts.w1", "experts.w3")) and not name.startswith("mtp."):
            found[_rename(name)] = tensor.detach().clone()
    for i, block in enumerate(model.layers):
        experts = block.ffn.experts
        found[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat((experts.w1, experts.w3), 1).detach()
    return found


def _rename(name: str) -> str:
    prefix, rest = "", name
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        prefix = f"model.layers.{layer}."
    for ours, theirs in _NAMES:
        if rest.startswith(ours):
            return prefix + theirs + rest.removeprefix(ours)
    raise KeyError(f"{name}: no name in transformers {VERSION}")
