"""Proves that kernels are chosen as the configuration says, refused in words, and set on every module of a model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.transformer import Transformer
from tests.runs import tiny
from trainer.config import PrecisionConfig
from trainer.parallel.apply import SEAMS, Seam, apply_kernels, choose_kernels, describe_kernels, serving

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = PrecisionConfig(dtype="bf16")


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "interpreted", "chosen"),
    [
        ("auto", CPU, "fp32", "1", ()),
        ("auto", GPU, "bf16", "0", serving(torch.bfloat16)),
        ("auto", GPU, "fp64", "0", ()),
        ("off", GPU, "bf16", "0", ()),
        ("triton", GPU, "fp32", "0", serving(torch.float32)),
        ("triton", CPU, "fp32", "1", serving(torch.float32)),
    ],
)
def test_chosen(
    asked: Any, device: torch.device, dtype: Any, interpreted: str, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    config = tiny.config(Path("corpus"), Path("runs"), kernels=asked, precision=PrecisionConfig(dtype=dtype))
    assert choose_kernels(config, device) == chosen


@pytest.mark.parametrize(
    ("changes", "interpreted", "message"),
    [
        ({}, "0", "kernels = triton: expected a GPU; on a CPU kernels=off, or TRITON_INTERPRET=1 for tests"),
        ({"threads": 2}, "1", "kernels = triton: expected threads=1 in Triton's interpreter"),
        ({"precision": PrecisionConfig(dtype="fp64")}, "1", "kernels = triton: expected precision.dtype of fp32 or"),
        ({"model": tiny.model(hc_mult=3)}, "1", "model.hc_mult = 3: expected a power of two, or kernels=off"),
        ({"model": tiny.model(head_dim=9)}, "1", "model.head_dim = 9: expected an even number, or kernels=off"),
        (
            {"model": tiny.model(hidden_size=20), "precision": BF16},
            "1",
            "model.hidden_size = 20: expected a multiple of 8 in bf16, or kernels=off",
        ),
        (
            {"model": tiny.model(moe_intermediate_size=12), "precision": BF16},
            "1",
            "model.moe_intermediate_size = 12: expected a multiple of 8 in bf16, or kernels=off",
        ),
        (
            {"model": tiny.model(n_routed_experts=1024), "precision": BF16},
            "1",
            "model.n_routed_experts = 1024: expected less than 1024 in bf16, or kernels=off",
        ),
    ],
)
def test_refused(changes: dict[str, Any], interpreted: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    config = tiny.config(Path("corpus"), Path("runs"), kernels="triton")
    with pytest.raises(ValueError, match=message):
        choose_kernels(replace(config, **changes), CPU)


def test_refused_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.parallel.apply._installed", lambda: False)
    config = tiny.config(Path("corpus"), Path("runs"), kernels="triton")
    with pytest.raises(ValueError, match="the package triton, which is not installed"):
        choose_kernels(config, GPU)
    assert choose_kernels(replace(config, kernels="auto"), GPU) == ()


def seams(model: Transformer) -> list[tuple[Seam, str]]:
    """The package of the function in every seam of the model."""
    return [
        (seam, getattr(module, seam.attribute).__module__)
        for seam in SEAMS
        for module in model.modules()
        if isinstance(module, seam.owner)
    ]


def test_every_module_of_the_model_is_set_or_none() -> None:
    model = Transformer(tiny.model())
    apply_kernels(model, ())
    assert not [module for _, module in seams(model) if module.startswith("model.kernels.")]
    apply_kernels(model, SEAMS)
    found = seams(model)
    assert {seam for seam, _ in found} == set(SEAMS)
    assert [module for seam, module in found if module != f"model.kernels.{seam.kernel.split('.')[0]}"] == []


def test_the_grouped_product_serves_in_bf16_alone() -> None:
    """Other widths are no matter in fp32, where nothing asks for rows of 16 bytes."""
    more = set(serving(torch.bfloat16)) - set(serving(torch.float32))
    assert [seam.kernel for seam in more] == ["grouped.grouped_matmul"]
    config = tiny.config(Path("corpus"), Path("runs"), kernels="triton", model=tiny.model(hidden_size=18))
    assert choose_kernels(replace(config, precision=PrecisionConfig(dtype="fp32")), GPU) == serving(torch.float32)


def test_what_serves_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_kernels(()) == "off"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    compiled = describe_kernels(serving(torch.float32))
    assert compiled.startswith("triton 3.")
    assert "rms_norm" in compiled
    assert "grouped_matmul" not in compiled
    assert describe_kernels(serving(torch.bfloat16)) == f"{compiled}; torch: grouped_matmul"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert describe_kernels(serving(torch.float32)) == compiled.replace(": ", " interpreted: ")
