"""Proves the table of initial values, that each tensor's values are its own affair, and that `tid2eid` is balanced."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import mhc
from model.config import InitConfig
from model.init import balanced_table, initial_value, initialize
from model.inventory import released_tensors
from model.losses import cross_entropy_sum
from model.names import locate, tensors
from model.transformer import Transformer
from tests.model.observing import mixes_of
from tests.model.released import released_config

DEBUG = released_config("debug")
CONFIG = InitConfig()


def initialized(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Transformer:
    """A debug model whose every value was NaN, or -1, before."""
    model = Transformer(replace(DEBUG, **changes), dtype)
    with torch.no_grad():
        for tensor in tensors(model).values():
            tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    initialize(model, CONFIG, seed)
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return initialized()


def test_every_value_is_that_of_the_table(model: Transformer) -> None:
    for spec in released_tensors(DEBUG):
        where = locate(spec.name)
        value = where.view(tensors(model)[where.parameter]).detach()
        if spec.kind in ("matrix", "table"):
            # Mean and standard deviation of n draws are off by std / sqrt(n) and less; five of those.
            slack = 5 * CONFIG.std / math.sqrt(value.numel())
            assert abs(float(value.mean())) < slack, spec.name
            assert abs(float(value.std()) - CONFIG.std) < slack, spec.name
        elif spec.name.endswith("tid2eid"):
            assert value.amin() >= 0
            assert value.amax() < DEBUG.n_routed_experts
        elif spec.name.endswith("norm.weight"):
            assert value.eq(1).all(), spec.name
        elif spec.name.endswith(("hc_attn_scale", "hc_ffn_scale", "hc_head_scale")):
            assert value.eq(0.01).all(), spec.name
        else:
            assert spec.name.endswith(("_base", "attn_sink", "ape", "gate.bias")), spec.name
            assert value.eq(0).all(), spec.name


def test_the_first_loss_is_that_of_a_uniform_guess(model: Transformer) -> None:
    token_BT = torch.arange(64).unsqueeze(0)
    with torch.no_grad():
        output = model(token_BT)
        for h_BTD, target_BT in ((output.h_BTD, token_BT), (output.mtp_h_BTD, token_BT[:, 1:])):
            mean = cross_entropy_sum(h_BTD, model.head.weight, target_BT) / target_BT.numel()
            # Logits have a deviation of std sqrt(D) = 0.07: half its square, and the mean of 64 draws of it.
            assert float(mean) == pytest.approx(math.log(DEBUG.vocab_size), abs=0.05)


def test_streams_start_almost_as_one_ordinary_residual(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BTND = torch.randn(1, 8, 1, DEBUG.hidden_size, generator=generator).expand(-1, -1, 4, -1)
    block = model.layers[0]
    pre, post, comb = mixes_of(block, x_BTND)
    # Specification 2: with base 0 and small gates A = 1/2, C = 1, comb = 1/4; but the mixes differ between streams.
    for mix, value in ((pre, 0.5), (post, 1.0), (comb, 0.25)):
        torch.testing.assert_close(mix, torch.full_like(mix, value), rtol=0, atol=0.01)
        assert mix.std() > 0
    carried = mhc.expand(x_BTND, torch.zeros_like(x_BTND[:, :, 0]), post, comb)
    torch.testing.assert_close(carried, x_BTND, rtol=1e-4, atol=1e-4)


def test_values_depend_on_seed_and_name_alone(model: Transformer) -> None:
    mine = tensors(model)
    again, shallower = tensors(initialized()), tensors(initialized(num_hidden_layers=1, compress_ratios=(0, 0)))
    assert all(torch.equal(value, again[name]) for name, value in mine.items())
    assert all(torch.equal(value, mine[name]) for name, value in shallower.items())
    other = tensors(initialized(seed=1))
    drawn = [name for name, value in mine.items() if value.unique().numel() > 2]
    assert not [name for name in drawn if torch.equal(mine[name], other[name])]
    specs = [spec for spec in released_tensors(DEBUG) if spec.kind in ("matrix", "table")]
    first_values = {float(initial_value(spec, CONFIG, 0, 8).flatten()[0]) for spec in specs}
    assert len(first_values) == len(specs), "no two tensors draw the same numbers"


def test_other_precisions_are_roundings_of_fp32(model: Transformer) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        for name, value in tensors(initialized(dtype)).items():
            assert torch.equal(value, tensors(model)[name].to(value.dtype)), name


def test_std_and_scale_are_configuration() -> None:
    model = Transformer(DEBUG)
    initialize(model, InitConfig(std=0.02, hc_scale=0.5), 0)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert model.layers[0].hc_attn_scale.eq(0.5).all()
    with pytest.raises(ValueError, match=r"std = 0\.0: expected"):
        InitConfig(std=0.0)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 9), st.integers(0, 1000))
def test_hash_tables_are_balanced_with_distinct_experts(tokens: int, K: int, more: int, seed: int) -> None:
    experts = K + more
    table = balanced_table(tokens, K, experts, torch.Generator().manual_seed(seed))
    assert table.shape == (tokens, K)
    assert table.dtype == torch.int64
    assert all(len(set(row)) == K for row in table.tolist())
    load = torch.bincount(table.flatten(), minlength=experts)
    assert len(load) == experts
    assert int(load.max() - load.min()) <= 1


def test_hash_tables_of_layers_differ_and_mix_experts() -> None:
    config = replace(DEBUG, num_hash_layers=2)
    specs = [spec for spec in released_tensors(config) if spec.name.endswith("tid2eid")]
    first, second = (initial_value(spec, CONFIG, 0, config.n_routed_experts) for spec in specs)
    assert not torch.equal(first, second)
    pairs = {tuple(sorted(row)) for row in first.tolist()}
    assert len(pairs) == 28, "all pairs of 8 experts occur"
