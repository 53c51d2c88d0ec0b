"""Proves that the codes which products with formats keep are counted: of a row's inputs, and beside the weights.

Oracle: as in tests/model/test_count_memory.py, every storage alive at the end of a row's forward pass, with the
products of the back ends in the model; a stand-in multiplies in place of a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from launch.compose import compose
from model import count_memory
from model.config import AttentionMode, InitConfig, ModelConfig
from model.count_kept import Copy
from model.count_memory import kept_bytes
from model.init import initialize
from model.logical import parameter_shapes
from model.transformer import Transformer
from tests.model.test_count_memory import BYTES, MODEL, RECOMPUTED, SCALARS, SIZES, make_row, measure
from tests.runs import tiny
from tests.trainer.precision import engine
from tests.trainer.precision.hopper import stand_in
from tests.trainer.precision.recipes import recipe
from trainer import plan_codes
from trainer.config import Recomputed, TrainConfig
from trainer.plan import plan
from trainer.precision import te
from trainer.precision.config import BackEnd, PrecisionConfig, RoundingConfig, RuleConfig
from trainer.precision.operands import Groups, Kept
from trainer.precision.serving import serve

LENGTH = 61
LONG, BLOCK = 132, 128
"""Two blocks of rows: of each expert's, too, where every token goes to both."""
BLOCKS = SIZES | {
    "hidden_size": 224,
    "head_dim": 32,
    "q_lora_rank": 64,
    "index_head_dim": 32,
    "moe_intermediate_size": 192,
}
ALIGNED_MTP = tiny.model(**BLOCKS)
ALIGNED = tiny.model(**BLOCKS | {"compress_ratios": (0, 4, 8, 4, 6), "num_nextn_predict_layers": 0})
ONE_MORE = 2500
"""Bytes of a row of every output of the MTP block, which has one token less and is cut out of a whole block."""
WIDE = tiny.model(**SIZES | {"hidden_size": 136, "moe_intermediate_size": 132, "n_routed_experts": 2})


def configured(model: ModelConfig, precision: PrecisionConfig, backend: BackEnd = "emulated") -> TrainConfig:
    here = Path("nowhere")
    return tiny.config(here, here, model=model, precision=replace(precision, backend=backend))


def serving(config: TrainConfig, length: int, codes: Sequence[object]) -> Callable[[Transformer], list[Tensor]]:
    """Sets a model's products and passes a row through, so that all is there that is made once: codes of weights, too,
    which are returned, and tables."""

    def change(model: Transformer) -> list[Tensor]:
        serve(model, config.precision, 0)
        with torch.no_grad():
            model(make_row(length).token_BT, mode="sparse")
        return [one for weight in codes for one in pieces(weight)]

    return change


def pieces(of: object) -> Iterator[Tensor]:
    """All tensors of an object, of those that it has, and so on."""
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, list):
        for one in of:
            yield from pieces(one)
    elif is_dataclass(of):
        for field in fields(of):
            yield from pieces(getattr(of, field.name))
    elif hasattr(of, "backwards"):
        assert of.backwards  # made when asked for
        for one in vars(of).values():
            yield from pieces(one)


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sequence[object]]:
    """Codes of weights, as they are asked for; `torch` and `te` serve."""
    stand_in(monkeypatch)
    monkeypatch.setattr(te, "refusal", lambda formats, device: "")
    found, of = list[object](), Kept.of

    def noted(self: Kept, weight: Tensor) -> Any:
        asked = of(self, weight)
        if not any(one is asked for one in found):
            found.append(asked)
        return asked

    monkeypatch.setattr(Kept, "of", noted)
    with engine.installed(monkeypatch):
        yield found


def check(
    config: TrainConfig,
    length: int,
    mode: AttentionMode = "sparse",
    recompute: tuple[Recomputed, ...] = (),
    codes: Sequence[object] = (),
    spare: int = SCALARS,
) -> None:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision.dtype]
    kept = measure(config.model, length, mode, recompute, dtype, serving(config, length, codes))
    inputs = plan_codes.inputs(config, 0, BYTES[dtype])
    counted = sum(kept_bytes(config.model, length, mode, recompute, BYTES[dtype], inputs).values())
    assert 0 <= kept - counted <= spare, (kept, counted)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTED, ids="+".join)
def test_codes_of_inputs_are_counted(recompute: tuple[Recomputed, ...]) -> None:
    """Every expert has a row here, none more than a block: their shares take the most that they can."""
    check(configured(MODEL, recipe("fp8")), LENGTH, "sparse", recompute)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dense", "indexer_warmup"])
@pytest.mark.parametrize("recompute", [(), ("attention",), ("block",)], ids="+".join)
def test_in_the_other_modes(recompute: tuple[Recomputed, ...], mode: AttentionMode) -> None:
    check(configured(MODEL, recipe("fp8")), LENGTH, mode, recompute)


@pytest.mark.parametrize(("name", "dtype"), [("fp8", "fp32"), ("fp8_fp4", "bf16"), ("mxfp8", "bf16")])
def test_by_recipe_and_type(name: str, dtype: Any) -> None:
    check(configured(WIDE, recipe(name, dtype)), LONG)


@pytest.mark.parametrize(
    ("backend", "name", "dtype"), [("torch", "fp8_fp4", "bf16"), ("torch", "fp8", "fp32"), ("te", "mxfp8", "bf16")]
)
def test_on_a_gpu(backend: BackEnd, name: str, dtype: Any, codes: Sequence[object]) -> None:
    """Rows in whole blocks and outputs in multiples of 32: else they are cut out of larger ones, which stay."""
    check(configured(ALIGNED, recipe(name, dtype), backend), 2 * BLOCK, codes=codes)


@pytest.mark.slow
@pytest.mark.parametrize("mode", get_args(AttentionMode))
@pytest.mark.parametrize("recompute", RECOMPUTED[3:5], ids="+".join)
def test_on_a_gpu_by_mode(recompute: tuple[Recomputed, ...], mode: AttentionMode, codes: Sequence[object]) -> None:
    check(configured(ALIGNED, recipe("fp8"), "torch"), BLOCK, mode, recompute, codes)


def test_on_a_gpu_with_mtp(codes: Sequence[object]) -> None:
    check(configured(ALIGNED_MTP, recipe("fp8"), "torch"), BLOCK, codes=codes, spare=ONE_MORE)


def test_another_back_end_is_caught(codes: Sequence[object]) -> None:
    config = configured(ALIGNED, recipe("fp8"), "torch")
    kept = measure(config.model, BLOCK, "sparse", (), torch.bfloat16, serving(config, BLOCK, codes))
    for backend in get_args(BackEnd):
        inputs = plan_codes.inputs(configured(ALIGNED, recipe("fp8"), backend), 0, 2)
        counted = sum(kept_bytes(config.model, BLOCK, "sparse", (), 2, inputs).values())
        assert (0 <= kept - counted <= SCALARS) == (backend in plan_codes.ON_GPU)
    assert not 0 <= kept - sum(kept_bytes(config.model, BLOCK, "sparse", (), 2).values()) <= SCALARS


ODD = {
    "a copy of what was rounded": {"input": "e4m3_1x1"},
    "the input itself": {"grad": "e4m3_1x128"},
    "experts' rows filled up": {"wgrad_grad": "e4m3_128x1"},
    "other blocks": {"input": "e4m3_1x128", "wgrad_input": "e4m3_32x1", "wgrad_grad": "e4m3_128x1"},
    "FP4, a byte a number": {"wgrad_input": "e2m1_16x1", "wgrad_grad": "e4m3_128x1"},
    "a weight only": {"weight": "e4m3_128x128"},
}


@pytest.mark.parametrize("rule", ODD)
def test_other_rules(rule: str) -> None:
    """Of every linear map, and of some: then others keep an input that they share with these."""
    for parameters in (
        recipe("fp8").rules["linears"].parameters,
        ("*.attn.wq_b.weight", "*.shared_experts.w3.weight", "*.attn.wkv.weight"),
    ):
        rules = {"odd": RuleConfig(parameters=parameters, **ODD[rule])}
        check(configured(MODEL, PrecisionConfig(rules=rules)), LENGTH)


def test_what_attention_looks_at_takes_no_more_when_it_is_rounded() -> None:
    rounded = {"index": RoundingConfig(format="e2m1_1x32"), "entries": RoundingConfig(format="e4m3_1x64")}
    check(configured(ALIGNED_MTP, replace(recipe("fp8"), **rounded)), LENGTH)


def test_formats_from_some_tokens_on() -> None:
    config = configured(MODEL, recipe("fp8"))
    later = replace(config.precision.rules["linears"], from_tokens=100)
    config = replace(config, precision=replace(config.precision, rules={"linears": later}))
    assert plan_codes.inputs(config, 99, 2).copies == {}
    assert plan_codes.inputs(config, 100, 2) == plan_codes.inputs(configured(MODEL, recipe("fp8")), 0, 2)


@pytest.mark.parametrize("side", [1, 32, 128])
def test_no_shares_of_rows_take_more_than_is_counted(side: int) -> None:
    """And some as much: one expert has what is left, the others one row more than whole blocks."""
    copy, draw = Copy(number_bytes=1, block=None, side=side, filled=True), torch.Generator().manual_seed(side)
    for rows, experts in ((0, 3), (2, 5), (100, 1), (1000, 7), (1000, 64)):
        most = 0
        for few in (1, 2, experts):
            shares = torch.randint(0, min(few, experts), (rows,), generator=draw).bincount(minlength=experts)
            most = max(most, sum(Groups(shares.tolist(), side).sizes))
        worst = [min(1, rows)] * min(rows, experts)
        worst[:1] = [rows - len(worst) + 1] if worst else []
        assert most <= copy.size(rows, 1, experts) == sum(Groups(worst, side).sizes)


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
@pytest.mark.parametrize("model", [MODEL, WIDE, ALIGNED_MTP], ids=["odd sizes", "wide", "whole sizes"])
def test_codes_beside_weights_are_counted(model: ModelConfig, name: str, codes: Sequence[object]) -> None:
    """Of a whole model, to the byte."""
    config = configured(model, recipe(name), "te")
    built = Transformer(model, torch.bfloat16)
    initialize(built, InitConfig(), 1)
    made = serving(config, LENGTH, codes)(built)
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in made}
    for weight in built.parameters():
        storages.pop(weight.untyped_storage()._cdata, None)
    assert plan_codes.beside_weights(config, parameter_shapes(model)) == sum(storages.values())


@pytest.mark.slow
def test_they_are_planned_where_the_back_end_is_named() -> None:
    """Of the experts those that a rank holds."""
    alone, shared = ["precision=fp8"], ["precision=fp8", "parallel.data=2", "parallel.expert=2"]
    whole = beside(alone, "torch")
    assert beside(alone, "auto") == beside(alone, "emulated") == 0 < whole == beside(alone, "te")
    config = compose(["threads=1", *alone]).config
    experts = {name: shape for name, shape in parameter_shapes(config.model).items() if ".experts." in name}
    assert whole - beside(shared, "torch") == plan_codes.beside_weights(config, experts) // 2


def test_a_line_says_what_is_counted() -> None:
    """In the plan's part on formats, with the bytes in full; without formats there is none."""
    size = f"{beside(['precision=fp8'], 'torch'):,}"
    for words, said in {
        ("precision.backend=te",): f"te keeps up to {size} bytes",
        ("precision.backend=emulated",): "rows keep what the emulated back end keeps",
        ("device=cpu",): "rows keep what the emulated back end keeps",
        (): f"keeps up to {size}",
    }.items():
        line = plan(compose(["threads=1", "precision=fp8", *words]).config).precision.partition("recipe")[2]
        assert said in line
        assert ("auto" in line) == (words == ())
    assert plan(compose(["threads=1", "precision=bf16"]).config).precision == ""


def beside(words: Sequence[str], backend: str) -> int:
    """How many bytes of weights a rank has beside the parameters."""
    config = compose(["threads=1", *words, f"precision.backend={backend}"]).config
    plain = replace(config, precision=replace(config.precision, rules={}))
    with_formats, without = (plan(of).layout.largest.memory.weights for of in (config, plain))
    return with_formats - without


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "a code of two bytes": (plan_codes, "_emulated", lambda *given, **kind: Copy(number_bytes=2, block=(128, 1))),
    "no scales": (plan_codes, "_emulated", lambda *given, **kind: Copy(number_bytes=1, block=None, side=128)),
    "experts' rows not filled up": (Copy, "_most", lambda self, rows, matrices: rows),
    "an input that is still kept": (count_memory, "attention_takes", lambda *given: True),
    "one that is kept no more": (count_memory, "attention_takes", lambda *given: False),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises(AssertionError):
        check(configured(MODEL, recipe("fp8")), LENGTH)
