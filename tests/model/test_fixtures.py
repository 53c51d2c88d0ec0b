"""Proves agreement with the fixtures: outside implementations of the released model, in fp64 and fp32, with gradients.

A fixture is a released folder, loaded by the one documented call; any further folder of the same format that lies
beside the three known ones is held to the same limits.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.names import load_released
from tests.model.observing import LossWeights, Rows, differences, observe

FOLDERS = Path(__file__).parents[2].parent / "shared" / "fixtures" / "model"
NAMES = sorted({"mixed", "nohash", "ratio128"} | {path.parent.name for path in FOLDERS.glob("*/config.json")})

FP64 = 1e-10
"""The fixtures allow 1e-7 on logits. Both sides compute in float64 and differ in the order of sums, 2e-14 measured; a
real difference of meaning is 1e-7 or more (the negative controls), so that the limit lies well between the two."""

STORED_AS_FP32 = 6e-8
"""Streams and gradients are float64 values stored as fp32: half a unit in the last place, relative to the largest."""

FP32_LOGITS = 1e-4
"""What the fixtures' README allows an fp32 run."""

FP32_NOISE = 5
"""And this many times what the fixture's own implementation loses by fp32."""

FP32_LOSS = 2e-6
"""A loss of 4 is stored in fp32 to 4.8e-7, and the noise recorded for a single number may be 0 by luck: four units."""

GRADIENT_FLOOR = 1e-6
"""The README's allowance for small gradients, relative to the largest."""


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / "io.safetensors"), json.loads((folder / "meta.json").read_text())


@cache
def observed(folder: Path, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Every case of a fixture; the gradients are those of loss + 0.3 mtp_loss."""
    io, meta = read(folder)
    model = load_released(folder, dtype)
    return [
        observe(model, one_document_per_row(io[f"case{k}.input_ids"].long()), "sparse", LossWeights(mtp=0.3))
        for k in range(len(meta["cases"]))
    ]


def one_document_per_row(token_BT: Tensor) -> Rows:
    return Rows(
        token_BT=token_BT,
        document_BT=torch.zeros_like(token_BT),
        position_BT=torch.arange(token_BT.shape[1]).expand_as(token_BT),
        target_BT=torch.cat((token_BT[:, 1:], torch.full_like(token_BT[:, :1], -1)), dim=1),
    )


def outputs(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and losses of one case under the fixture's names."""
    named = {name: found[name] for name in ("logits", "mtp_logits") if name in found}
    for ours, theirs in (("lm", "loss"), ("mtp", "mtp_loss")):
        if found[f"{ours}_count"]:
            named[theirs] = found[f"{ours}_sum"] / found[f"{ours}_count"]
    return named


def expected_outputs(io: dict[str, Tensor], case: int) -> dict[str, Tensor]:
    kinds = ("logits", "mtp_logits", "loss", "mtp_loss")
    stored = {kind: io[f"case{case}.{kind}"] for kind in kinds if f"case{case}.{kind}" in io}
    return {kind: value.flatten(0, 1) if value.dim() == 3 else value for kind, value in stored.items()}


@pytest.mark.parametrize("name", NAMES)
def test_fp64_logits_and_losses(shared: Path, name: str) -> None:
    folder = shared / "fixtures" / "model" / name
    io, _ = read(folder)
    for case, found in enumerate(observed(folder, torch.float64)):
        expected = expected_outputs(io, case)
        assert outputs(found).keys() - {"mtp_logits"} == expected.keys() - {"mtp_logits"}
        assert not differences(outputs(found), expected, FP64), f"case {case}"


@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits_and_losses(shared: Path, name: str) -> None:
    folder = shared / "fixtures" / "model" / name
    io, meta = read(folder)
    for case, found in enumerate(observed(folder, torch.float32)):
        for kind, expected in expected_outputs(io, case).items():
            noise = FP32_NOISE * meta["hf_fp32_minus_fp64"][f"case{case}.{kind}"]
            limit = min(FP32_LOGITS, noise) if "logits" in kind else max(FP32_LOSS, noise)
            error = float((outputs(found)[kind].double() - expected).abs().max())
            assert error <= limit, f"case {case}, {kind}: {error} > {limit}"


@pytest.mark.parametrize("name", NAMES)
def test_streams_of_every_layer(shared: Path, name: str) -> None:
    folder = shared / "fixtures" / "model" / name
    io, meta = read(folder)
    B, T = io["case0.input_ids"].shape
    fp64, fp32 = (observed(folder, dtype)[0] for dtype in (torch.float64, torch.float32))
    layers = [name for name in fp64 if name.startswith("hidden.") and f"case0.{name}" in io]
    assert len(layers) == len(load_released(folder).layers)
    for name in (*layers, "last_hidden"):
        at = [found[name].unflatten(0, (B, T))[:, io["hidden_positions"].long()] for found in (fp64, fp32)]
        expected = io[f"case0.{name}"]
        assert not differences({name: at[0]}, {name: expected}, FP64 + STORED_AS_FP32)
        noise = FP32_NOISE * meta["hf_fp32_minus_fp64"][f"case0.{name}"]
        assert (at[1].double() - expected.double()).abs().max() <= noise, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_chosen_experts_and_blocks_are_identical(shared: Path, name: str, dtype: torch.dtype) -> None:
    folder = shared / "fixtures" / "model" / name
    io, _ = read(folder)
    found = observed(folder, dtype)[0]
    experts = {key: value for key, value in io.items() if key.startswith("case0.router_index.")}
    blocks = {key: value for key, value in io.items() if key.startswith("case0.index_topk.")}
    assert experts
    assert {key.removeprefix("case0.") for key in blocks} == {key for key in found if key.startswith("index_topk.")}
    for key, value in experts.items():
        assert torch.equal(found[key.removeprefix("case0.")], value.long()), key
    for key, value in blocks.items():
        assert torch.equal(found[key.removeprefix("case0.")].sort(-1).values, value.flatten(0, 1).long()), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(shared: Path, name: str, dtype: torch.dtype) -> None:
    folder = shared / "fixtures" / "model" / name
    _, meta = read(folder)
    found, expected = observed(folder, dtype)[0], load_file(folder / "grads.safetensors")
    for key, value in expected.items():
        error = float((found[f"grad.{key}"].double() - value.double()).abs().max())
        limit = FP32_NOISE * meta["grad_abs_noise"][noise_name(key)] + GRADIENT_FLOOR * meta["largest_grad"]
        if dtype == torch.float64:
            limit = min(limit, STORED_AS_FP32 * float(value.abs().max()) + FP64)
        assert error <= limit, f"{key}: {error} > {limit}"
    assert not [key for key in found if ".indexer." in key and key.startswith("grad.") and found[key].any()]


def noise_name(key: str) -> str:
    """The key of `grad_abs_noise` for a released tensor: routed experts are recorded as the stacks of that layer."""
    match = re.fullmatch(r"(layers\.\d+|mtp\.0)\.ffn\.experts\.\d+\.(w[123])\.weight", key)
    if match is None:
        return key
    block = "mtp.block" if match[1] == "mtp.0" else f"model.{match[1]}"
    return f"{block}.mlp.experts.{'down_proj' if match[2] == 'w2' else 'gate_up_proj'}"
