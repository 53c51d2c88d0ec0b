"""The config.json of an export: the model's keys, and those that say how its tensors are stored."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from model.config import CSA_RATIO, ModelConfig
from trainer.released.layout import Variant

V4_HCA_RATIO = 128
FP8: Mapping[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
"""What tools look for under quantization_config."""


def config_text(config: ModelConfig, variant: Variant, like: tuple[str, Variant] | None) -> str:
    """The text of a config.json. like: one of the same model and its format, whose other keys are kept.

    It comes back unchanged where the format is the same.
    """
    if like is not None and like[1] == variant:
        return like[0]
    keys = json.loads(like[0]) | _in_other_words(config) if like is not None else _of_model(config)
    for key in ("expert_dtype", "quantization_config", "torch_dtype", "dtype"):
        keys.pop(key, None)
    keys["dtype"] = "float32" if variant == "fp32" else "bfloat16"
    if variant in ("released", "fp8"):
        keys["expert_dtype"] = "fp4" if variant == "released" else "fp8"
        keys["quantization_config"] = dict(FP8)
    return json.dumps(keys, indent=2) + "\n"


def first_difference(mine: ModelConfig, other: ModelConfig) -> str | None:
    """The first key in which two models differ."""
    return next((one.name for one in fields(mine) if getattr(mine, one.name) != getattr(other, one.name)), None)


def _of_model(config: ModelConfig) -> dict[str, Any]:
    named = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    keys = named | {key: value for key, value in asdict(config).items() if value is not None}
    return keys | {"compress_ratios": list(config.compress_ratios)} | _in_other_words(config)


def _in_other_words(config: ModelConfig) -> dict[str, Any]:
    """What transformers needs where HCA layers have one other rate than V4's: it knows `compress_ratios` 0, 4 and 128.

    It has no words for several rates.
    """
    rates = set(config.attention_ratios) - {0, CSA_RATIO}
    if len(rates) != 1 or rates == {V4_HCA_RATIO}:
        return {}
    names = {0: "sliding_attention", CSA_RATIO: "compressed_sparse_attention"}
    (rate,) = rates
    return {
        "layer_types": [names.get(ratio, "heavily_compressed_attention") for ratio in config.attention_ratios],
        "compress_rates": {"compressed_sparse_attention": CSA_RATIO, "heavily_compressed_attention": rate},
    }
