"""Proves the precision of each part: fp64 stays fp64 and fp32 stays fp32 in every operation, bf16 keeps fp32 islands.

In bf16 the islands (mHC, router, compressor, norms, logits, losses) lose nothing by bf16 but their input's rounding;
losses, selections and gradients stay near those of fp32.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import mhc, transformer
from model.config import AttentionMode
from model.inventory import released_tensors
from model.names import load_released, locate, tensors
from model.rope import frequencies
from model.router import Gate
from model.transformer import Transformer
from tests.model.mistakes import mistake
from tests.model.observing import LossWeights, build, mixes_of, observe, pack
from tests.oracles.cases import documents
from tests.oracles.make_golden import FOLDER

MODES: tuple[AttentionMode, ...] = ("dense", "indexer_warmup", "sparse")
WEIGHTS = LossWeights(mtp=0.3, balance=0.1, indexer=1.0)
HALF_UNIT = 2.0**-8
"""bf16 keeps 8 bits: a rounding changes a number by up to this part of itself."""


class Forbid(TorchDispatchMode):
    """Fails at the first operation whose result has a forbidden type."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            assert not (isinstance(leaf, Tensor) and leaf.dtype in self.dtypes), f"{function} made {leaf.dtype}"
        return result


@pytest.fixture
def known_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frequencies are fp32 numbers by definition: made before, so that nothing else may be."""
    config = load_released(FOLDER).config
    known = {compressed: frequencies(config, compressed=compressed) for compressed in (False, True)}
    monkeypatch.setattr(transformer, "frequencies", lambda _, *, compressed: known[compressed])


def run(dtype: torch.dtype, mode: AttentionMode, *forbidden: torch.dtype) -> None:
    """Forward, losses and backward of the golden model on packed documents."""
    model = load_released(FOLDER, dtype)
    rows = pack(documents(1, (3, 14, 9), model.config.vocab_size), padding=5)
    with Forbid(*forbidden):
        observe(model, rows, mode, WEIGHTS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("known_frequencies")
def test_fp64_is_fp64_everywhere(mode: AttentionMode) -> None:
    run(torch.float64, mode, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fp32_and_bf16_never_make_fp64(dtype: torch.dtype) -> None:
    run(dtype, "sparse", torch.float64)


LITERAL_FP32 = {
    "norms": mistake("layers.at_least_fp32", ("return x.float() if", "return x.float() if True or")),
    "rotation": mistake("rope.rotation", ("position.to(dtype)", "position.float()")),
    "balance": mistake("moe.balance_sum", ("torch.zeros_like(score_BTE)", "torch.zeros(score_BTE.shape)")),
}


@pytest.mark.parametrize("name", LITERAL_FP32)
@pytest.mark.usefixtures("known_frequencies")
def test_an_island_that_is_literally_fp32_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    LITERAL_FP32[name].make(monkeypatch)
    with pytest.raises(AssertionError, match=r"made torch\.float32"):
        run(torch.float64, "sparse", torch.float32)


def test_parameters_of_islands_are_fp32_in_a_bf16_model() -> None:
    model = load_released(FOLDER, torch.bfloat16)
    mine = tensors(model)
    expected = {}
    for spec in released_tensors(model.config):
        island = torch.float32 if spec.is_island or spec.name.endswith("gate.bias") else torch.bfloat16
        expected[locate(spec.name).parameter] = torch.int64 if spec.name.endswith("tid2eid") else island
    assert {name: tensor.dtype for name, tensor in mine.items()} == expected
    fp32 = {name.split(".")[-1] for name, dtype in expected.items() if dtype == torch.float32}
    assert {"hc_attn_fn", "hc_ffn_base", "hc_head_scale", "attn_sink", "ape", "bias"} <= fp32
    assert {
        name for name, dtype in expected.items() if name.endswith("norm.weight") and dtype != torch.float32
    } == set()
    rows = pack(documents(2, (7, 18), model.config.vocab_size))
    observe(model, rows, "sparse", WEIGHTS)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype, name


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_bf16_is_near_fp32(seed: int) -> None:
    """The same bf16 weights, computed in bf16 with islands and in fp32. Compared over 120 tokens, not one by one."""
    bf16, fp32 = (build(seed, dtype, num_hash_layers=1) for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        for rounded, exact in zip(bf16.parameters(), fp32.parameters(), strict=True):
            exact.copy_(rounded)
    rows = pack(documents(seed, (40, 33, 27, 20), 61))
    found, expected = (observe(model, rows, "sparse", WEIGHTS) for model in (bf16, fp32))
    assert all(value.isfinite().all() for value in found.values())
    for kind in ("lm", "mtp"):
        difference = (found[f"{kind}_sum"] - expected[f"{kind}_sum"]) / expected[f"{kind}_count"]
        # Mean over the tokens, in nats, at a loss of 5: 0.04 measured. Single tokens differ by up to 1.4.
        assert abs(float(difference)) < 0.1, kind
    for name, value in expected.items():
        if name.startswith(("router_index", "index_topk")):
            # 0.95 measured: a bf16 stream moves a close call.
            assert (found[name] == value).double().mean() > 0.9, name
    names = [name for name, value in expected.items() if name.startswith("grad.") and value.any()]
    cosines = [torch.cosine_similarity(found[n].double().flatten(), expected[n].double().flatten(), 0) for n in names]
    assert torch.stack(cosines).mean() > 0.9  # 0.94 measured


def twin(model: Transformer) -> Transformer:
    """The same values in fp64."""
    exact = Transformer(model.config, torch.float64)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensors(exact)[name].copy_(tensor)
    return exact


@torch.no_grad()
def test_islands_of_a_bf16_model_compute_in_fp32() -> None:
    """On equal bf16 inputs their results are those of fp64 up to fp32 rounding, a thousandth of a bf16 rounding."""
    model = load_released(FOLDER, torch.bfloat16)
    exact, config = twin(model), model.config
    x_BTND = torch.randn(
        1, 50, config.hc_mult, config.hidden_size, generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    h_BTD = x_BTND[:, :, 0]

    def islands(model: Transformer, x_BTND: Tensor, h_BTD: Tensor) -> dict[str, Tensor]:
        block, gate = model.layers[1], model.layers[2].ffn.gate
        assert isinstance(gate, Gate)
        route = gate(h_BTD, torch.zeros(1, 50, dtype=torch.int64))
        pre, post, comb = mixes_of(block, x_BTND)
        compressor = block.attn.compressor
        projected = {"compressor": compressor.wkv(h_BTD), "gate of the compressor": compressor.wgate(h_BTD)}
        mixes = {"pre": pre, "post": post, "comb": comb}
        return (
            mixes | projected | {"scores": route.score_BTE, "weights": route.weight_BTK, "logits": model.logits(h_BTD)}
        )

    found = islands(model, x_BTND, h_BTD)
    expected = islands(exact, x_BTND.double(), h_BTD.double())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        scale = float(value.abs().max().clamp_min(1))
        assert float((found[name].double() - value).abs().max()) < HALF_UNIT / 100 * scale, name
    # Results in the streams' type are rounded once.
    for name, function in (
        ("norm", lambda m, x: m.layers[0].attn_norm(x[:, :, 0])),
        ("collapse", lambda m, x: mhc.collapse(x, found["pre"].to(island(m)))),
        ("expand", lambda m, x: mhc.expand(x, x[:, :, 1], found["post"].to(island(m)), found["comb"].to(island(m)))),
    ):
        once, exactly = function(model, x_BTND), function(exact, x_BTND.double())
        assert once.dtype == torch.bfloat16, name
        assert ((once.double() - exactly).abs() <= 1.01 * HALF_UNIT * exactly.abs() + 1e-6).all(), name


def island(model: Transformer) -> torch.dtype:
    return model.hc_head_fn.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_one_two_and_three_tokens(mode: AttentionMode, dtype: torch.dtype) -> None:
    model = load_released(FOLDER, dtype)
    for T in (1, 2, 3):
        found = observe(model, pack([list(range(T))]), mode, WEIGHTS)
        assert found["logits"].shape == (T, model.config.vocab_size)
        assert ("mtp_logits" in found) == (T > 1)
        assert all(value.isfinite().all() for value in found.values())
        assert (int(found["lm_count"]), int(found["mtp_count"])) == (T - 1, max(T - 2, 0))
        if mode != "dense":
            assert found["indexer_sum.1"] == 0
