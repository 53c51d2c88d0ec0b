"""Proves that the back end `te` hands Transformer Engine the operands of the emulated products, in its layouts.

A stand-in for the parts of 2.20.2 that are called computes here, by what its sources say of them: A the weight, B the
rows, rowwise codes with the summed dim last, scales of blocks 1x128 as [K / 128, rows], of 128x128 as [rows / 128,
K / 128 up to a multiple of 4]. That the real ones do is for a GPU to show (`test_gpu.py`).
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from enum import IntEnum
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.precision.hopper import FP8, on_hopper, operands
from tests.trainer.precision.test_blockscaled import RAGGED, assert_equal, three
from trainer.precision import backends, te
from trainer.precision.health import Watch

CUDA = torch.device("cuda")
TE, EMULATED = backends.products_of("te"), backends.products_of("emulated")
DType = IntEnum("DType", {"kFloat8E4M3": 7})


class Float8BlockQuantizer:
    def __init__(self, fp8_dtype: DType, *, rowwise: bool, columnwise: bool, block_scaling_dim: int) -> None:
        assert (fp8_dtype, rowwise, columnwise) == (DType.kFloat8E4M3, True, False)
        self.block_scaling_dim = block_scaling_dim


class Float8BlockwiseQTensorStorage:
    def __init__(
        self,
        rowwise_data: Tensor,
        rowwise_scale_inv: Tensor,
        columnwise_data: None,
        columnwise_scale_inv: None,
        fp8_dtype: DType,
        quantizer: Float8BlockQuantizer,
        is_2D_scaled: bool,
    ) -> None:
        self.codes, self.scales, self.tall = rowwise_data, rowwise_scale_inv, is_2D_scaled
        assert quantizer.block_scaling_dim == (2 if is_2D_scaled else 1)

    def values(self) -> Tensor:
        rows, K = self.codes.shape
        assert self.codes.dtype == torch.uint8
        assert self.codes.is_contiguous()
        assert self.scales.is_contiguous(), "its address and shape are all that is handed on"
        assert (rows % 8, K % 16) == (0, 0)
        k_K = torch.arange(K) // 128
        if self.tall:
            assert self.scales.shape == (-(-rows // 128), -(-K // 512) * 4)
            scale = self.scales[torch.arange(rows) // 128][:, k_K]
        else:
            assert self.scales.shape == (-(-K // 128), -(-rows // 4) * 4)
            scale = self.scales[k_K].mT
        return self.codes.view(torch.float8_e4m3fn).float() * scale


Storage = Float8BlockwiseQTensorStorage


def general_gemm(A: Storage, B: Storage, out_dtype: torch.dtype, layout: str) -> tuple[Tensor, None, None, None]:
    assert layout == "TN"
    assert not B.tall, "2D by 2D is not there"
    return (B.values() @ A.values().mT).to(out_dtype), None, None, None


def general_grouped_gemm(
    A: list[Storage],
    B: list[Storage],
    out: list[Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    layout: str,
    m_splits: list[int] | None = None,
    use_split_accumulator: bool = False,
) -> None:
    assert len(A) == len(B) == len(out) == len(quantization_params)
    # The compiled call has a vector of integers here, which None is not, though the Python one above it allows that.
    assert m_splits == [len(one.codes) for one in B]
    assert use_split_accumulator
    for one, a, b in zip(out, A, B, strict=True):
        assert one.is_contiguous()
        assert one.dtype == out_dtype
        one.copy_(general_gemm(a, b, out_dtype, layout)[0])


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The stand-in, installed, on a Hopper GPU."""
    modules = {name: ModuleType(name) for name in ("transformer_engine", *te.USED)}
    parts = (DType, Float8BlockQuantizer, Float8BlockwiseQTensorStorage, general_gemm, general_grouped_gemm)
    for module, names in te.USED.items():
        for part in parts:
            if part.__name__ in names:
                setattr(modules[module], part.__name__, part)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: modules.get(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.20.2")
    on_hopper(monkeypatch)
    yield modules
    te._used.cache_clear()
    te._quantizer.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("counts", "D", "out"), [(RAGGED, 200, 72), ([256, 128], 640, 384), ([7], 128, 16)])
def test_products_equal_the_emulated_ones(counts: list[int], D: int, out: int, dtype: torch.dtype) -> None:
    given = operands(counts, D, out, dtype)
    found, expected = (
        three(lambda x, w, back=back: back.grouped(FP8, Watch())(x, w, counts), **given) for back in (TE, EMULATED)
    )
    assert_equal(found, expected)


@pytest.mark.usefixtures("library")
def test_linear_maps_and_maps_side_by_side_equal_the_emulated_ones() -> None:
    given = operands([75] * 4, 136, 24, torch.float32)
    x, grad = (given[name].unflatten(0, (4, 3, 25)).permute(1, 2, 0, 3) for name in ("x", "grad"))
    found, expected = (three(back.side_by_side(FP8, Watch()), x, given["weight"], grad) for back in (TE, EMULATED))
    assert_equal(found, expected)
    one = {"x": given["x"], "weight": given["weight"][0], "grad": given["grad"]}
    assert_equal(*(three(back.linear(FP8, Watch()), **one) for back in (TE, EMULATED)))


@pytest.mark.usefixtures("library")
def test_the_known_release_serves_hopper() -> None:
    assert te.refusal(FP8, CUDA) == ""
    assert te.describe() == "te 2.20.2: general_gemm and general_grouped_gemm, blocks of 1x128 and 128x128"


def test_another_release_is_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.21.0")
    assert te.refusal(FP8, CUDA) == "transformer-engine is 2.21.0, and its calls are known of 2.20.2 only"


def test_a_name_that_is_gone_is_refused(library: dict[str, ModuleType]) -> None:
    del library["transformer_engine.pytorch.cpp_extensions"].general_grouped_gemm
    line = "transformer-engine 2.20.2 lacks transformer_engine.pytorch.cpp_extensions.general_grouped_gemm"
    assert te.refusal(FP8, CUDA) == line


def test_a_library_that_cannot_be_imported_is_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    line = "transformer-engine 2.20.2 cannot be imported: import of transformer_engine.pytorch halted"
    assert te.refusal(FP8, CUDA).startswith(line)


def test_where_it_is_not_installed_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder of its name lies about, of which no package tells."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    on_hopper(monkeypatch)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    assert te.refusal(FP8, CUDA) == "the package transformer-engine is not installed"


@pytest.mark.usefixtures("library")
def test_an_old_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch, cuda="12.8")
    assert te.refusal(FP8, CUDA) == "this torch is built for CUDA 12.8, before 12.9"


def test_blackwell_is_another_recipe_and_a_cpu_has_none(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch, (10, 0))
    line = "compute capability 10.0 scales blocks of 32: other numbers, so another recipe, mxfp8"
    assert te.refusal(FP8, CUDA) == line
    assert te.refusal(FP8, torch.device("cpu")).startswith("a cpu has no block-scaled FP8 products")
