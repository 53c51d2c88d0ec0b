"""A Hopper GPU's block-scaled products on any device, as torch and cuBLAS document their arguments.

It reads codes and scales by the documented layouts only and asserts what the libraries ask, so that what reaches the
real call is proven as far as a machine without one can.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.precision import blockscaled
from trainer.precision.elements import E2M1_1X32, E4M3_1X128, E4M3_128X1, E4M3_128X128, E4M3_OF_FP4
from trainer.precision.formats import rounded
from trainer.precision.layouts import HOPPER
from trainer.precision.recipe import Formats

FP8 = Formats(
    rule="linears",
    weight=(E4M3_128X128,),
    input=E4M3_1X128,
    grad=E4M3_1X128,
    wgrad_input=E4M3_128X1,
    wgrad_grad=E4M3_128X1,
)
FP8_FP4 = Formats(
    rule="experts",
    weight=(E2M1_1X32, E4M3_OF_FP4),
    input=E4M3_1X128,
    grad=E4M3_1X128,
    wgrad_input=E4M3_128X1,
    wgrad_grad=E4M3_128X1,
)
ALIGNED = 16
"""Bytes of an address that the tensor cores' copies start at."""


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: Any,
    scale_b: Tensor,
    scale_recipe_b: Any,
    *,
    output_dtype: torch.dtype,
) -> Tensor:
    """torch.nn.functional.scaled_mm of blocks 1x128 by blocks 1x128 or 128x128, computed in fp32."""
    (M, K), N = mat_a.shape, mat_b.shape[1]
    assert (mat_a.dtype, mat_b.dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn)
    assert (mat_a.stride(1), mat_b.stride(0)) == (1, 1), "a row by row, b column by column"
    assert mat_a.stride(0) % ALIGNED == 0
    assert mat_b.stride(1) % ALIGNED == 0
    assert M % 8 == 0, "cuBLAS: outer dims of FP8 are multiples of 8"
    assert (K % 16, N % 16) == (0, 0)
    assert all(one.data_ptr() % ALIGNED == 0 for one in (mat_a, mat_b, scale_a, scale_b))
    assert scale_recipe_a == F.ScalingType.BlockWise1x128
    a_MK = mat_a.float() * _of_rows(scale_a, M, K)
    if scale_recipe_b == F.ScalingType.BlockWise1x128:
        b_NK = mat_b.mT.float() * _of_rows(scale_b, N, K)
    else:
        assert scale_recipe_b == F.ScalingType.BlockWise128x128
        quads = -(-K // 512) * 4
        assert (scale_b.dtype, scale_b.shape) == (torch.float32, (quads, -(-N // 128)))
        assert scale_b.stride() == (1, quads)
        n_N, k_K = torch.arange(N) // 128, torch.arange(K) // 128
        b_NK = mat_b.mT.float() * scale_b.mT[n_N][:, k_K]
    return (a_MK @ b_NK.mT).to(output_dtype)


def _of_rows(scale: Tensor, rows: int, K: int) -> Tensor:
    assert (scale.dtype, scale.shape) == (torch.float32, (rows, -(-K // 128)))
    assert scale.stride() == (1, rows)
    return scale[:, torch.arange(K) // 128]


def on_hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), cuda: str = "13.0") -> None:
    """torch.device("cuda") looks like such a GPU, to those that ask what it is."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def operands(counts: list[int], D: int, out: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """x [P, D], weights [E, out, D] that hold their format's numbers, a gradient [P, out]; rows of unlike sizes."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(sum(counts), D, generator=draw) * torch.randn(sum(counts), 1, generator=draw).exp()
    weight = rounded(torch.randn(len(counts), out, D, generator=draw) * 0.02, E4M3_128X128)
    grad = torch.randn(sum(counts), out, generator=draw) * 1e-3
    return {name: one.to(device, dtype) for name, one in {"x": x, "weight": weight, "grad": grad}.items()}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The back end `torch` serves on a CPU, its products made by the stand-in."""
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    monkeypatch.setattr(blockscaled, "refusal", lambda formats, device: HOPPER.refusal(formats))
