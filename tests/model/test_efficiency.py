"""Proves the efficiency claim by count: the published shares of V3.2's FLOP and cache, and what each part costs."""

import pytest

from model.efficiency import CONTEXTS, contexts, entry_bytes, index_key_bytes, v4_cost, v32_cost
from tests.model.released import released_config

MILLION = 2**20


@pytest.mark.parametrize(
    ("name", "flops", "cache"),
    [("pro", "26.7", "10.5"), ("flash", "10.1", "7.3")],
)
def test_shares_at_a_million_tokens(name: str, flops: str, cache: str) -> None:
    """The report rounds them to 27 % and 10 %, 10 % and 7 %."""
    ours, theirs = v4_cost(released_config(name), MILLION), v32_cost(MILLION)
    assert f"{100 * ours.flops / theirs.flops:.1f}" == flops
    assert f"{100 * ours.cache_bytes / theirs.cache_bytes:.1f}" == cache


@pytest.mark.parametrize(
    ("name", "parts"),
    [("v3.2", ("77.1", "1048.0", "69.6")), ("pro", ("101.6", "64.4", "153.3")), ("flash", ("28.4", "45.1", "47.2"))],
)
def test_parts_at_a_million_tokens(name: str, parts: tuple[str, ...]) -> None:
    """GFLOP in linear maps, index scores and attention as the specification's section 9 derives them."""
    cost = v32_cost(MILLION) if name == "v3.2" else v4_cost(released_config(name), MILLION)
    found = (cost.linear_flops, cost.index_flops, cost.attention_flops)
    assert tuple(f"{flops / 1e9:.1f}" for flops in found) == parts


@pytest.mark.parametrize(("name", "per_token"), [("pro", 30 * (584 + 68) / 4 + 31 * 584 / 128), ("flash", 3514.25)])
def test_bytes_per_token(name: str, per_token: float) -> None:
    """What each further token adds; windows and tails do not grow."""
    config = released_config(name)
    assert (entry_bytes(config), index_key_bytes(config)) == (584, 68)
    grown = v4_cost(config, MILLION).cache_bytes - v4_cost(config, MILLION // 2).cache_bytes
    assert grown / (MILLION // 2) == per_token
    assert v32_cost(MILLION).cache_bytes / MILLION == 48068


def test_a_model_is_counted_at_the_lengths_it_can_have() -> None:
    assert contexts(released_config("flash")) == CONTEXTS
    assert contexts(released_config("debug")) == (4096,)
