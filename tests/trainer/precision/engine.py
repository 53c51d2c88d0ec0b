"""The parts of Transformer Engine 2.20.2 that are called, on any device, by what its sources say of them.

A the weight, B the rows, rowwise codes with the summed dim last. Scales of blocks 1x128 lie as [K / 128, rows], of
128x128 as [rows / 128, K / 128 up to a multiple of 4], both fp32; of 1x32 as E8M0 [rows up to a multiple of 128, K / 32
up to one of 4], to be swizzled before the product.
"""

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import ModuleType

import pytest
import torch
from torch import Tensor

from trainer.precision import te

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


class MXFP8Quantizer:
    def __init__(self, fp8_dtype: DType, *, rowwise: bool, columnwise: bool) -> None:
        assert (fp8_dtype, rowwise, columnwise) == (DType.kFloat8E4M3, True, False)


class MXFP8TensorStorage:
    def __init__(
        self,
        rowwise_data: Tensor,
        rowwise_scale_inv: Tensor,
        columnwise_data: None,
        columnwise_scale_inv: None,
        fp8_dtype: DType,
        quantizer: MXFP8Quantizer,
        with_gemm_swizzled_scales: bool,
    ) -> None:
        self.codes, self.scales, self.tall = rowwise_data, rowwise_scale_inv, False
        assert isinstance(quantizer, MXFP8Quantizer)
        assert not with_gemm_swizzled_scales

    def values(self) -> Tensor:
        rows, K = self.codes.shape
        assert (self.codes.dtype, self.scales.dtype) == (torch.uint8, torch.uint8)
        assert self.codes.is_contiguous()
        assert self.scales.is_contiguous()
        assert (rows % 32, K % 32) == (0, 0)
        assert self.scales.shape == (-(-rows // 128) * 128, -(-K // 128) * 4)
        scale = self.scales.view(torch.float8_e8m0fnu).float()[:rows, torch.arange(K) // 32]
        return self.codes.view(torch.float8_e4m3fn).float() * scale


Storage = Float8BlockwiseQTensorStorage | MXFP8TensorStorage


def general_gemm(A: Storage, B: Storage, out_dtype: torch.dtype, layout: str) -> tuple[Tensor, None, None, None]:
    assert layout == "TN"
    assert type(A) is type(B)
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


PARTS = (
    DType,
    Float8BlockQuantizer,
    Float8BlockwiseQTensorStorage,
    MXFP8Quantizer,
    MXFP8TensorStorage,
    general_gemm,
    general_grouped_gemm,
)


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The stand-in in the library's place; its modules by name."""
    modules = {name: ModuleType(name) for name in ("transformer_engine", *te.USED)}
    for module, names in te.USED.items():
        for part in PARTS:
            if part.__name__ in names:
                setattr(modules[module], part.__name__, part)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.20.2")
    yield modules
    for made in (te._used, te._quantizer, te._mx_quantizer):
        made.cache_clear()
