"""The configurations of `configs/model`, released models and `debug`, read without the configuration machinery."""

from pathlib import Path

import yaml

from model.config import ModelConfig, RopeScaling

ROOT = Path(__file__).parents[2]


def released_config(name: str) -> ModelConfig:
    """The model named flash, pro or debug."""
    raw = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    if "rope_scaling" in raw:
        raw["rope_scaling"] = RopeScaling(**raw["rope_scaling"])
    return ModelConfig(**raw | {"compress_ratios": tuple(raw["compress_ratios"])})
