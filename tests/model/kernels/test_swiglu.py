"""Proves that the kernel of the clamped SwiGLU equals the plain function, also at and beyond the clamps."""

from functools import partial
from pathlib import Path

import pytest

from model import experts
from model.kernels import swiglu
from tests.model.kernels.twins import HERE, PLACES, Inputs, Place, apart, mistaken, random

LIMIT = 1.25
"""A number that bf16 holds, so that elements can lie on it; a quarter of the random ones lie beyond."""


def operands(place: Place, *shape: int, weighted: bool) -> Inputs:
    gate, up = random(place, *shape, seed=1), random(place, *shape, seed=2)
    gate.view(-1)[0], up.view(-1)[0], up.view(-1)[1] = LIMIT, LIMIT, -LIMIT
    weight = {"weight_P": random(place, shape[0], seed=3, island=True)} if weighted else {}
    return {"gate_PF": gate, "up_PF": up} | weight


@pytest.mark.parametrize("shape", [(1, 3), (11, 37), (6, 600)])
@pytest.mark.parametrize("place", PLACES)
def test_with_routing_weight(place: Place, shape: tuple[int, ...]) -> None:
    inputs = operands(place, *shape, weighted=True)
    plain, twin = partial(experts.clamped_swiglu, limit=LIMIT), partial(swiglu.clamped_swiglu, limit=LIMIT)
    assert apart(plain, twin, inputs) < place.limit


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 20)])
@pytest.mark.parametrize("place", PLACES)
def test_without(place: Place, shape: tuple[int, ...]) -> None:
    inputs, fixed = operands(place, *shape, weighted=False), {"weight_P": None, "limit": LIMIT}
    assert (
        apart(partial(experts.clamped_swiglu, **fixed), partial(swiglu.clamped_swiglu, **fixed), inputs) < place.limit
    )


def test_no_rows() -> None:
    empty = random(HERE, 0, 8)
    assert swiglu.clamped_swiglu(empty, empty, empty[:, 0], LIMIT).shape == (0, 8)


MISTAKES = {
    "up not clamped below": ("tl.minimum(tl.maximum(up, -limit), limit)", "tl.minimum(up, limit)"),
    "no gradient on the bound": ("raw_gate <= limit", "raw_gate < limit"),
    "gradient beyond the clamp": ("tl.where((raw_up >= -limit) & (raw_up <= limit), ", "tl.where(raw_up <= limit, "),
    "silu's second term": ("(1 + gate * (1 - sigmoid))", "1.0"),
    "weight's gradient after the weight": ("tl.sum(grad * gate * sigmoid * up, 1)", "tl.sum(grad * gate * up, 1)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    wrong, inputs = mistaken(tmp_path, "swiglu", MISTAKES[name]), operands(HERE, 11, 37, weighted=True)
    plain, twin = partial(experts.clamped_swiglu, limit=LIMIT), partial(wrong.clamped_swiglu, limit=LIMIT)
    assert apart(plain, twin, inputs) > 100 * HERE.limit
