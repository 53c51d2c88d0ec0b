"""Proves that the kernels at mHC sites equal `mhc.enter` and `mhc.expand`: maps, Sinkhorn rounds and all gradients."""

from functools import partial
from pathlib import Path

import pytest

from model import mhc
from model.kernels import enter, expand
from tests.model.kernels.twins import HERE, PLACES, Inputs, Place, apart, mistaken, random

SHAPES = [(1, 3, 4, 20), (2, 17, 4, 36), (1, 5, 2, 70)]
"""B, T, N, D: less than a tile of tokens and more, channels that fill no tile."""
FIXED = {"iterations": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}


def site(place: Place, B: int, T: int, N: int, D: int) -> Inputs:
    rows = (2 + N) * N
    return {
        "x_BTND": random(place, B, T, N, D),
        "fn": random(place, rows, N * D, seed=1, island=True, scale=0.2),
        "base": random(place, rows, seed=2, island=True),
        "scale": random(place, 3, seed=3, island=True),
    }


def back_into_streams(place: Place, B: int, T: int, N: int, D: int) -> Inputs:
    return {
        "x_BTND": random(place, B, T, N, D),
        "y_BTD": random(place, B, T, D, seed=1),
        "post_BTN": random(place, B, T, N, seed=2, island=True),
        "comb_BTNN": random(place, B, T, N, N, seed=3, island=True),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_enter(place: Place, shape: tuple[int, int, int, int]) -> None:
    assert apart(partial(mhc.enter, **FIXED), partial(enter.enter, **FIXED), site(place, *shape)) < place.limit


@pytest.mark.parametrize("iterations", [1, 2])
def test_enter_with_few_rounds_and_large_eps(iterations: int) -> None:
    fixed = {"iterations": iterations, "hc_eps": 0.1, "norm_eps": 0.3}
    inputs = site(HERE, 1, 6, 4, 12)
    assert apart(partial(mhc.enter, **fixed), partial(enter.enter, **fixed), inputs) < HERE.limit


def test_enter_with_more_tokens_than_a_share_of_fn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enter, "CHUNK", 16)
    fixed = FIXED | {"iterations": 2}
    inputs = site(HERE, 2, 20, 2, 8)
    assert apart(partial(mhc.enter, **fixed), partial(enter.enter, **fixed), inputs) < HERE.limit


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_expand(place: Place, shape: tuple[int, int, int, int]) -> None:
    assert apart(mhc.expand, expand.expand, back_into_streams(place, *shape)) < place.limit


ENTER_MISTAKES = {
    "the last round left out": ("(TOKENS, N, N)), hc_eps, ITERATIONS)", "(TOKENS, N, N)), hc_eps, ITERATIONS - 1)"),
    "eps twice": ("0, N, N)) + hc_eps\n    post", "0, N, N)) + 2 * hc_eps\n    post"),
    "post without its factor": ("post = 2 * tl.sigmoid", "post = tl.sigmoid"),
    "no gradient through the root": (
        "tl.store(factor_ptr + token, -total *",
        "tl.store(factor_ptr + token, 0 * total *",
    ),
    "fn's gradient of the first share": ("return grad_x, fn_part.sum(0)", "return grad_x, fn_part[0]"),
    "the collapse's gradient left out": ("factor * x + pre * grad_u", "factor * x"),
    "base's gradient of the first tile": ("fn_part.sum(0), base_part.sum(0)", "fn_part.sum(0), base_part[0]"),
}


@pytest.mark.parametrize("name", ENTER_MISTAKES)
def test_a_mistake_on_the_way_in_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mistaken(tmp_path, "enter", ENTER_MISTAKES[name])
    monkeypatch.setattr(wrong, "CHUNK", 16)
    fixed = {"iterations": 2, "hc_eps": 0.1, "norm_eps": 1e-6}
    assert apart(partial(mhc.enter, **fixed), partial(wrong.enter, **fixed), site(HERE, 2, 20, 2, 8)) > 100 * HERE.limit


SUM_J, SUM_K = "comb = comb / (tl.sum(comb, 1) + eps)[:, None, :]", "comb = comb / (tl.sum(comb, 2) + eps)[:, :, None]"
SINKHORN_MISTAKES = {
    "first over the other axis": (f"{SUM_J}\n    for", f"{SUM_K}\n    for"),
    "eps not in a sum": (f"        {SUM_K}", "        comb = comb / tl.sum(comb, 2)[:, :, None]"),
    "a division not undone": ("        comb = comb * divisor[:, :, None]\n    divisor", "    divisor"),
    "softmax's mean left out": ("(grad - tl.sum(grad * softmax, 2)[:, :, None])", "grad"),
}


@pytest.mark.parametrize("name", SINKHORN_MISTAKES)
def test_a_mistake_in_the_rounds_is_seen(name: str, tmp_path: Path) -> None:
    mistaken(tmp_path, "sinkhorn", SINKHORN_MISTAKES[name])
    wrong = mistaken(tmp_path, "enter", ("from model.kernels.sinkhorn import", "from mistaken_sinkhorn import"))
    fixed = {"iterations": 3, "hc_eps": 0.1, "norm_eps": 1e-6}
    assert apart(partial(mhc.enter, **fixed), partial(wrong.enter, **fixed), site(HERE, 1, 5, 4, 8)) > 100 * HERE.limit


COMB = "comb = tl.load(comb_ptr + (token[:, None] * N + {}) * N + {}, mask=there, other=0.0)\n        out"
EXPAND_MISTAKES = {
    "comb transposed": (COMB.format("j", "k"), COMB.format("k", "j")),
    "the layer's output for a stream": (
        "out += comb[:, :, None] * x[:, None, :]",
        "out += comb[:, :, None] * y[:, None, :]",
    ),
    "one stream's share of comb": ("tl.arange(0, N)[None, :, None] == j", "tl.arange(0, N)[None, :, None] == 0"),
    "post's gradient of the last slice": ("grad_post += ", "grad_post = "),
}


@pytest.mark.parametrize("name", EXPAND_MISTAKES)
def test_a_mistake_on_the_way_out_is_seen(name: str, tmp_path: Path) -> None:
    wrong = mistaken(tmp_path, "expand", EXPAND_MISTAKES[name])
    assert apart(mhc.expand, wrong.expand, back_into_streams(HERE, 1, 5, 2, 70)) > 100 * HERE.limit
