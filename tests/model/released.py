"""The released models' configurations, read from `configs/model` without the configuration machinery."""

from pathlib import Path

import yaml

from model.config import ModelConfig, RopeScaling

ROOT = Path(__file__).parents[2]


def released_config(name: str) -> ModelConfig:
    raw = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    raw["rope_scaling"] = RopeScaling(**raw["rope_scaling"])
    return ModelConfig(**raw | {"compress_ratios": tuple(raw["compress_ratios"])})
