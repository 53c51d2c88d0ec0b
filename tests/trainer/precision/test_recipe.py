"""Proves that each parameter has the formats of one rule, at every number of tokens; wrong rules are refused."""

import re
from dataclasses import replace

import pytest

from launch.compose import compose
from model.inventory import released_tensors
from model.logical import locate
from tests.runs import tiny
from tests.trainer.precision.recipes import recipe
from trainer.precision.config import PrecisionConfig, RuleConfig
from trainer.precision.elements import E2M1_1X32, E4M3_128X128, E4M3_OF_FP4, named
from trainer.precision.recipe import PLAIN, Recipe
from trainer.precision.table import lines, render

MODEL = tiny.model()
EXPERTS = RuleConfig(parameters=("*.ffn.experts.w*",), weight="e4m3_128x128")


def rules(**of: RuleConfig) -> Recipe:
    return Recipe(PrecisionConfig(rules=of), MODEL)


@pytest.mark.parametrize("model", ["debug", "small", "flash", "pro"])
@pytest.mark.parametrize("name", ["fp8", "fp8_fp4", "mxfp8"])
def test_formats_are_those_of_the_released_checkpoint(name: str, model: str) -> None:
    """fp8_fp4 has FP8 where the released model has, and FP4 likewise; others FP8 in both places; the rest is plain."""
    config = compose([f"model={model}"]).config.model
    table = Recipe(recipe(name), config).at(0)
    for spec in released_tensors(config, experts=1):
        if spec.kind == "buffer":
            continue
        formats = table[locate(spec.name).parameter]
        if spec.stored == "FP4" and name == "fp8_fp4":
            assert formats.weight == (E2M1_1X32, E4M3_OF_FP4)
        elif spec.stored in ("FP4", "F8_E4M3"):
            assert formats.weight == (named("e4m3_1x32") if name == "mxfp8" else E4M3_128X128,)
        else:
            assert formats == PLAIN


def test_a_later_rule_stands_above_an_earlier_one() -> None:
    """Of two that name a parameter the last one holds, from its tokens on."""
    later = replace(EXPERTS, parameters=("layers.0.ffn.experts.w*",), input="e4m3_1x128", from_tokens=100)
    of = rules(first=EXPERTS, second=later)
    assert of.stages == (0, 100)
    assert [of.at(tokens)["layers.0.ffn.experts.w1"].rule for tokens in (0, 99, 100)] == ["first", "first", "second"]
    assert of.at(100)["layers.1.ffn.experts.w1"].rule == "first"
    assert of.rounded() == {f"{block}.ffn.experts.w{n}" for block in ("layers.0", "layers.1", "mtp.0") for n in "123"}


def test_the_hash_is_of_what_is_computed() -> None:
    """Another name of a rule is the same recipe; another format, floor or number of tokens is not."""
    base = rules(one=EXPERTS).hash()
    assert rules(other=EXPERTS).hash() == base
    others = [
        rules(one=replace(EXPERTS, input="e4m3_1x128")),
        rules(one=replace(EXPERTS, from_tokens=5)),
        rules(one=replace(EXPERTS, parameters=("layers.0.ffn.experts.w*",))),
        Recipe(PrecisionConfig(rules={"one": EXPERTS}, floor_e4m3=0.0), MODEL),
    ]
    assert len({base, *(other.hash() for other in others)}) == 5


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"parameters": ("*.attn.wq.weight",)}, "parameters = ['*.attn.wq.weight']: expected names of this model's"),
        ({"parameters": ("*.gate.weight",)}, "expected no layers.0.ffn.gate.weight, which is stored and computed in"),
        ({"parameters": ("embed.weight",)}, "expected no embed.weight"),
        ({"parameters": ("*.experts.w2",)}, "expected the same formats for w1, w2 and w3 of a layer's experts"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(rule: dict[str, tuple[str, ...]], said: str) -> None:
    """One line with the key, the value and what was expected."""
    with pytest.raises(ValueError, match=re.escape(said)):
        rules(one=replace(EXPERTS, **rule))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("weight=e5m2_1x128", "weight = e5m2_1x128: expected a format such as e4m3_1x128"),
        ("weight=e2m1_1x32>e4m3_1x32>e4m3_128x128", "expected one format, or two as in"),
        ("input=e4m3_128x128", "input = e4m3_128x128: expected a block within a row, or a scale would tell of later"),
        ("wgrad_input=e4m3_1x128", "wgrad_input = e4m3_1x128: expected a block within a column"),
        ("from_tokens=-1", "from_tokens = -1: expected at least 0 tokens"),
    ],
)
def test_wrong_rules_are_refused_with_their_key(words: str, said: str) -> None:
    """Before any process starts, with the whole key."""
    key, _, value = words.partition("=")
    quoted = f"'{value}'" if ">" in value else value
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        compose(["precision=fp8", f"precision.rules.linears.{key}={quoted}"])
    assert "precision.rules.linears" in str(caught.value)


def test_the_table_counts_every_parameter_once() -> None:
    """Numbers and bytes of all lines are those of the model; FP4 is sent in 4 bits and a scale of 8 for 32."""
    flash = compose(["model=flash"]).config.model
    found = lines(recipe("fp8_fp4"), flash, 0, 2)
    specs = [spec for spec in released_tensors(flash, experts=1) if spec.kind != "buffer"]
    total = sum(spec.size * (flash.n_routed_experts if spec.group == "experts" else 1) for spec in specs)
    assert sum(line.parameters for line in found) == total
    (experts,) = (line for line in found if line.group == "experts")
    assert experts.sent / experts.parameters == (4 + 8 / 32) / 8
    assert "experts  experts  e2m1_1x32>e4m3_128x128" in re.sub(" +", "  ", render(recipe("fp8_fp4"), flash, 2))
