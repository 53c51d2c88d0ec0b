"""Proves that the experts' products in one call equal the plain ones; on a CPU torch makes them one by one."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import experts
from model.kernels import grouped
from tests.model.kernels.twins import GPU_BF16, GPU_FP32, Inputs, Place, apart, mistaken, random

CPU_FP32 = Place(device="cpu", dtype=torch.float32, limit=5e-6)
CPU_BF16 = Place(device="cpu", dtype=torch.bfloat16, limit=2**-7)
PLACES = [
    pytest.param(CPU_FP32, id="cpu fp32"),
    pytest.param(CPU_BF16, id="cpu bf16"),
    pytest.param(GPU_FP32, marks=pytest.mark.gpu, id="gpu fp32"),
    pytest.param(GPU_BF16, marks=pytest.mark.gpu, id="gpu bf16"),
]
UNEVEN = [5, 0, 1, 17, 0, 2]


def operands(place: Place, counts: list[int], D: int, F: int) -> Inputs:
    return {"x_PD": random(place, sum(counts), D), "w_EFD": random(place, len(counts), F, D, seed=1, scale=0.1)}


@pytest.mark.parametrize(("D", "F"), [(8, 16), (24, 8), (136, 264)])
@pytest.mark.parametrize("counts", [UNEVEN, [0, 3, 0], [1], [7, 7], [0, 0, 130]])
@pytest.mark.parametrize("place", PLACES)
def test_equals_the_plain_function(place: Place, counts: list[int], D: int, F: int) -> None:
    plain, twin = partial(experts.grouped_matmul, counts=counts), partial(grouped.grouped_matmul, counts=counts)
    assert apart(plain, twin, operands(place, counts, D, F)) < place.limit


def gradients(place: Place, counts: list[int]) -> tuple[Tensor, ...]:
    """Of a sum, whose own gradient is one number in every place: its strides are 0."""
    x_PD, w_EFD = (one.requires_grad_() for one in operands(place, counts, 8, 16).values())
    return torch.autograd.grad(grouped.grouped_matmul(x_PD, w_EFD, counts).sum(), (x_PD, w_EFD))


@pytest.mark.parametrize("place", PLACES)
def test_no_rows_at_all(place: Place) -> None:
    grad_x, grad_w = gradients(place, [0, 0, 0])
    assert grad_x.shape == (0, 8)
    assert grad_w.eq(0).all()
    assert grad_w.shape == (3, 16, 8)


@pytest.mark.parametrize("place", PLACES)
def test_an_expert_without_rows_gets_gradient_zero(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch leaves a sum over no rows as the memory was."""
    product = F.grouped_mm

    def unwritten(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        y = product(a, b, offs=offs)
        if y.dim() == 3:
            y[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return y

    monkeypatch.setattr(F, "grouped_mm", unwritten)
    _, grad_w = gradients(place, UNEVEN)
    assert [bool(grad_FD.eq(0).all()) for grad_FD in grad_w] == [rows == 0 for rows in UNEVEN]
    assert grad_w.isfinite().all()


@pytest.mark.parametrize("place", PLACES)
def test_an_experts_bits_are_of_its_own_rows_and_repeat(place: Place) -> None:
    x_PD, w_EFD = operands(place, UNEVEN, 136, 264).values()

    def bits(rows: slice, counts: list[int]) -> tuple[Tensor, ...]:
        x, w = x_PD[rows].clone().requires_grad_(), w_EFD.clone().requires_grad_()
        y = grouped.grouped_matmul(x, w, counts)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), (x, w)))

    whole, again = bits(slice(None), UNEVEN), bits(slice(None), UNEVEN)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    y_pf, grad_pd, grad_EFD = bits(slice(6, 23), [0, 0, 0, 17, 0, 0])
    assert torch.equal(y_pf, whole[0][6:23])
    assert torch.equal(grad_pd, whole[1][6:23])
    assert torch.equal(grad_EFD[3], whole[2][3])


def test_rows_that_no_expert_has_are_refused() -> None:
    x_PD, w_EFD = operands(CPU_FP32, [2, 2], 8, 8).values()
    with pytest.raises(AssertionError, match="expected 4 in all"):
        grouped.grouped_matmul(x_PD, w_EFD, [2, 1])


def test_fp64_is_refused() -> None:
    ones: Any = torch.ones(2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match="expected fp32 or bf16, found fp64"):
        grouped.grouped_matmul(ones, ones.unsqueeze(0), [2])


MISTAKES = {
    "ends one expert late": ("list(accumulate(counts))", "list(accumulate([0, *counts]))[:-1]"),
    "counts for ends": ("list(accumulate(counts))", "counts"),
    "gradient of x by the transposed weight": ("F.grouped_mm(grad_PF, w_EFD,", "F.grouped_mm(grad_PF, w_EFD.mT,"),
    "weight's gradient transposed": (
        "F.grouped_mm(grad_PF.mT, x_PD, offs=end_E)",
        "F.grouped_mm(x_PD.mT, grad_PF, offs=end_E)",
    ),
    "last expert's gradient lost": ("if rows == 0:", "if rows in (0, ctx.counts[-1]):"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    wrong, counts = mistaken(tmp_path, "grouped", MISTAKES[name]), [5, 0, 1, 17, 0, 2]
    inputs = operands(CPU_FP32, counts, 24, 24)
    plain, twin = partial(experts.grouped_matmul, counts=counts), partial(wrong.grouped_matmul, counts=counts)
    assert apart(plain, twin, inputs) > 100 * CPU_FP32.limit
