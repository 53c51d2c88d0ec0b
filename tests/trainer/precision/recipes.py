"""The recipes of configs/precision, as tests use them."""

from dataclasses import replace
from functools import cache

from launch.compose import compose
from trainer.precision.config import Precision, PrecisionConfig


@cache
def recipe(name: str, dtype: Precision = "bf16", fp4_from: int = 0) -> PrecisionConfig:
    """That of a file; fp4_from: tokens after which experts turn to FP4."""
    words = [f"precision.rules.experts.from_tokens={fp4_from}"] if fp4_from else []
    found = compose([f"precision={name}", *words]).config
    return replace(found.precision, dtype=dtype)
