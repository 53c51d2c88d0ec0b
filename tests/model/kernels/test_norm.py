"""Proves that the kernels of RMSNorm, with and without rotation, and of the rotation equal their plain functions."""

from functools import partial
from pathlib import Path

import pytest
import torch

from model import layers, rope
from model.kernels import norm, rotate
from model.rope import Rotation
from tests.model.kernels.twins import HERE, PLACES, Place, apart, mistaken, random

EPS = 1e-6


def turn(place: Place, B: int, T: int, pairs: int) -> Rotation:
    angle = random(place, B, T, pairs, seed=3, island=True)
    return Rotation(cos=angle.cos(), sin=angle.sin())


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 20), (1, 300, 33), (2, 5, 4096)])
@pytest.mark.parametrize("place", PLACES)
def test_rms_norm(place: Place, shape: tuple[int, ...]) -> None:
    inputs = {"x": random(place, *shape), "weight": random(place, shape[-1], seed=1, island=True)}
    assert apart(partial(layers.rms_norm, eps=EPS), partial(norm.rms_norm, eps=EPS), inputs) < place.limit


def test_rms_norm_of_more_rows_than_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "PARTIALS", 2)
    inputs = {"x": random(HERE, 13, 2048), "weight": random(HERE, 2048, seed=1, island=True)}
    assert apart(partial(layers.rms_norm, eps=EPS), partial(norm.rms_norm, eps=EPS), inputs) < HERE.limit


@pytest.mark.parametrize(("shape", "pairs"), [((2, 7, 24), 4), ((1, 5, 3, 16), 8), ((2, 3, 2, 12), 1)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_norm_rotate(place: Place, weighted: bool, shape: tuple[int, ...], pairs: int) -> None:
    inputs = {"x": random(place, *shape)}
    fixed = {"eps": EPS, "turn": turn(place, *shape[:2], pairs)}
    if weighted:
        inputs["weight"] = random(place, shape[-1], seed=1, island=True)
    else:
        fixed["weight"] = None
    assert apart(partial(rope.norm_rotate, **fixed), partial(norm.norm_rotate, **fixed), inputs) < place.limit


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("shape", "pairs"), [((2, 7, 24), 4), ((1, 5, 3, 16), 8), ((2, 3, 2, 12), 1)])
@pytest.mark.parametrize("place", PLACES)
def test_rotate(place: Place, shape: tuple[int, ...], pairs: int, inverse: bool) -> None:
    fixed = {"turn": turn(place, *shape[:2], pairs), "inverse": inverse}
    inputs = {"x": random(place, *shape)}
    assert apart(partial(rope.rotate, **fixed), partial(rotate.rotate, **fixed), inputs) < place.limit


MISTAKES = {
    "mean of the gradient left out": ("grad - normal * (tl.sum(grad * normal, 1) / C)[:, None]", "grad"),
    "gradient not turned back": ("grad, cos, -angles(", "grad, cos, angles("),
    "weight's gradient without the norm": ("tl.sum(grad * normal, 0)", "tl.sum(grad * x, 0)"),
    "eps twice": (
        "x * tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]",
        "x * tl.rsqrt(tl.sum(x * x, 1) / C + 2 * eps)[:, None]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_norm_is_seen(name: str, tmp_path: Path) -> None:
    wrong = mistaken(tmp_path, "norm", MISTAKES[name])
    inputs = {"x": random(HERE, 2, 7, 24), "weight": random(HERE, 24, seed=1, island=True)}
    fixed = {"eps": 1e-2, "turn": turn(HERE, 2, 7, 4)}
    assert apart(partial(rope.norm_rotate, **fixed), partial(norm.norm_rotate, **fixed), inputs) < HERE.limit
    assert apart(partial(rope.norm_rotate, **fixed), partial(wrong.norm_rotate, **fixed), inputs) > 100 * HERE.limit


def test_a_mistake_in_the_rotation_is_seen(tmp_path: Path) -> None:
    wrong = mistaken(tmp_path, "rotate", ("even * sin + odd * cos", "odd * cos - even * sin"))
    fixed = {"turn": turn(HERE, 2, 7, 4)}
    inputs = {"x": random(HERE, 2, 7, 24)}
    assert apart(partial(rope.rotate, **fixed), partial(wrong.rotate, **fixed), inputs) > 100 * HERE.limit


def test_fp64_is_refused() -> None:
    with pytest.raises(TypeError, match="expected fp32 or bf16, found fp64"):
        norm.rms_norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4), EPS)
