"""Proves that the back end `torch` hands block-scaled products the operands of the emulated ones, in torch's layouts.

Here a stand-in for torch's call computes; on a GPU `test_gpu.py` asks the real one.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.trainer.precision.hopper import FP8, FP8_FP4, on_hopper, operands, scaled_mm
from trainer.precision import backends, blockscaled, layouts, products
from trainer.precision.elements import E2M1_1X32, E4M3_128X128
from trainer.precision.health import Watch, seen, together
from trainer.precision.operands import WeightCodes

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""fp32: sums of some hundred terms in another order; bf16: a result may be rounded to the other side."""
RAGGED = [5, 0, 130, 128, 1]
TORCH, EMULATED = backends.products_of("torch"), backends.products_of("emulated")


@pytest.fixture(autouse=True)
def _tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)


def three(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """y, dx and dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = product(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, one, other in zip(("y", "dx", "dW"), found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        largest = other.float().abs().max()
        assert float((one.float() - other.float()).abs().max()) <= LIMITS[other.dtype] * largest, name


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("D", "out"), [(128, 128), (640, 384), (200, 72), (130, 8)])
@pytest.mark.parametrize("counts", [RAGGED, [256, 128], [7], [0, 3]])
def test_experts_products_equal_the_emulated_ones(counts: list[int], D: int, out: int, dtype: torch.dtype) -> None:
    given = operands(counts, D, out, dtype)
    found, expected = (
        three(lambda x, w, back=back: back.grouped(FP8, Watch())(x, w, counts), **given) for back in (TORCH, EMULATED)
    )
    assert_equal(found, expected)
    assert [bool(grad.any()) for grad in found[2]] == [count > 0 for count in counts]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [(1, 1), (2, 64), (3, 50)])
def test_a_linear_map_equals_the_emulated_one(rows: tuple[int, int], dtype: torch.dtype) -> None:
    given = operands([rows[0] * rows[1]], 256, 136, dtype)
    x, weight, grad = given["x"].unflatten(0, rows), given["weight"][0], given["grad"].unflatten(0, rows)
    found, expected = (three(back.linear(FP8, Watch()), x, weight, grad) for back in (TORCH, EMULATED))
    assert_equal(found, expected)


def test_maps_side_by_side_equal_the_emulated_ones() -> None:
    given = operands([75] * 4, 136, 24, torch.float32)
    x, grad = (given[name].unflatten(0, (4, 3, 25)).permute(1, 2, 0, 3) for name in ("x", "grad"))
    found, expected = (three(back.side_by_side(FP8, Watch()), x, given["weight"], grad) for back in (TORCH, EMULATED))
    assert_equal(found, expected)


def test_kernels_make_the_codes_of_the_plain_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here in Triton's interpreter: not a bit of any product is another."""
    given, found = operands(RAGGED, 200, 72, torch.float32), []
    for casts in ("casts", "kernels"):
        monkeypatch.setattr(layouts, "casts", lambda casts=casts: import_module(f"trainer.precision.{casts}"))
        found.append(three(lambda x, w: TORCH.grouped(FP8, Watch())(x, w, RAGGED), **given))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def turned(x: Tensor) -> Tensor:
    """The same numbers, column by column in memory."""
    return x.mT.contiguous().mT


@pytest.mark.parametrize("name", ["x", "weight", "grad"])
def test_how_an_operand_lies_in_memory_changes_nothing(name: str) -> None:
    """Whole blocks, so that nothing is filled up, which would lay the codes out afresh."""
    given = operands([256], 256, 128, torch.float32)
    given["weight"] = given["weight"][0]
    other = given | {name: turned(given[name])}
    for one, two in zip(*(three(TORCH.linear(FP8, Watch()), **of) for of in (given, other)), strict=True):
        assert torch.equal(one, two)


def test_no_rows_at_all() -> None:
    given = operands([0, 0], 128, 16, torch.bfloat16)
    y, grad_x, grad_weight = three(lambda x, w: TORCH.grouped(FP8, Watch())(x, w, [0, 0]), **given)
    assert (y.shape, grad_x.shape) == ((0, 16), (0, 128))
    assert grad_weight.eq(0).all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_seen_where_the_emulated_products_show_it(bad: float) -> None:
    counts = [5, 140]
    given = operands(counts, 256, 24, torch.float32)
    given["x"][9, 200] = bad
    found, expected = (
        three(lambda x, w, back=back: back.grouped(FP8, Watch())(x, w, counts), **given) for back in (TORCH, EMULATED)
    )
    assert expected[0].isnan().any()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert one.isinf().sum() == 0


@pytest.mark.parametrize("counts", [RAGGED, [130]])
def test_notes_are_those_of_the_emulated_back_end(counts: list[int]) -> None:
    """However many zeros each fills up with: of a linear map's rows the emulated one with none."""
    given, notes = operands(counts, 200, 72, torch.bfloat16), []
    for back in (TORCH, EMULATED):
        watch = Watch()
        watch.on = True
        if len(counts) == 1:
            three(lambda x, w, back=back, watch=watch: back.linear(FP8, watch)(x, w.squeeze(0)), **given)
        else:
            three(lambda x, w, back=back, watch=watch: back.grouped(FP8, watch)(x, w, counts), **given)
        notes.append(seen(watch.notes))
    assert notes[0].keys() == {"input", "grad", "wgrad_grad"}
    assert notes[0] == notes[1]


def test_notes_of_parts_are_together_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are of whole blocks, also along tokens."""
    given, notes = operands([300], 200, 72, torch.float32), []
    for most in (1 << 24, 130 * 200):
        monkeypatch.setattr(products, "NOTED", most)
        watch = Watch()
        watch.on = True
        three(lambda x, w, watch=watch: TORCH.linear(FP8, watch)(x, w.squeeze(0)), **given)
        notes.append(seen(watch.notes))
    whole, parts = notes
    assert {operand: len(of) for operand, of in parts.items()} == {"input": 3, "grad": 1, "wgrad_grad": 2}
    for operand, (one,) in whole.items():
        many = together(parts[operand])
        assert (many.size, many.lost, many.poisoned, many.amax) == (one.size, one.lost, one.poisoned, one.amax)
        assert (many.error, many.square) == pytest.approx((one.error, one.square), rel=1e-13)


def test_weights_are_encoded_once_for_each_of_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    weight_codes = WeightCodes

    def counted(weight: Tensor) -> WeightCodes:
        made.append(weight._version)
        return weight_codes(weight)

    monkeypatch.setattr(layouts, "WeightCodes", counted)
    given, product = operands([40, 2], 128, 16, torch.float32), TORCH.grouped(FP8, Watch())
    weight = torch.nn.Parameter(given["weight"])
    first = product(given["x"], weight, [40, 2])
    assert torch.equal(product(given["x"], torch.nn.Parameter(weight.detach()), [40, 2]), first)
    assert made == [0]
    with torch.no_grad():
        weight.copy_(2 * weight)
    assert torch.equal(product(given["x"], weight, [40, 2]), 2 * first)
    assert made == [0, 1]


def test_a_frozen_weight_keeps_nothing_and_has_no_gradient() -> None:
    given, saved = operands([130], 128, 16, torch.float32), []
    x = given["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        y = TORCH.grouped(FP8, Watch())(x, given["weight"], [130])
    assert saved == []
    assert torch.autograd.grad(y.sum(), x)[0].any()


def test_between_the_passes_inputs_are_kept_as_codes() -> None:
    given, saved = operands([130], 256, 16, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        TORCH.grouped(FP8, Watch())(given["x"], given["weight"].requires_grad_(), [130])
    assert sum(one.nbytes for one in saved) == 130 * 256 + 130 * 2


def test_torchs_own_check_takes_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its fake tensors; it knows whole blocks only, and asks more of strides than the products here."""
    monkeypatch.undo()
    checked: list[torch.Size] = []

    def check(*arguments: Any, output_dtype: torch.dtype) -> Tensor:
        fakes = [
            torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
            if torch.is_tensor(one)
            else one
            for one in arguments
        ]
        checked.append(real(*fakes, output_dtype=output_dtype).shape)
        return scaled_mm(*arguments, output_dtype=output_dtype)

    real = F.scaled_mm
    monkeypatch.setattr(F, "scaled_mm", check)
    given = operands([256, 0, 3], 640, 384, torch.bfloat16)
    three(lambda x, w: TORCH.grouped(FP8, Watch())(x, w, [256, 0, 3]), **given)
    assert checked == [(256, 384), (128, 384), (256, 640), (128, 640), (384, 640), (384, 640)]


CUDA = torch.device("cuda")


def test_hopper_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch)
    assert blockscaled.refusal(FP8, CUDA) == ""
    assert blockscaled.refusal(FP8_FP4, CUDA) == ""


@pytest.mark.parametrize(
    ("capability", "cuda", "line"),
    [
        ((10, 0), "13.0", "compute capability 10.0 scales blocks of 32: other numbers, so another recipe, mxfp8"),
        ((12, 0), "13.0", "compute capability 12.0 scales blocks of 32: other numbers, so another recipe, mxfp8"),
        ((8, 0), "13.0", "compute capability 8.0 has no block-scaled FP8 products; 9.0 (Hopper) has"),
        ((9, 0), "12.8", "this torch is built for CUDA 12.8, before 12.9"),
    ],
)
def test_other_devices_and_libraries_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, line: str
) -> None:
    on_hopper(monkeypatch, capability, cuda)
    assert blockscaled.refusal(FP8, CUDA) == line


def test_a_cpu_and_a_torch_without_the_call_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "a cpu has no block-scaled FP8 products; an NVIDIA GPU of compute capability 9.0 has"
    assert blockscaled.refusal(FP8, torch.device("cpu")) == line
    on_hopper(monkeypatch)
    monkeypatch.delattr(F, "scaled_mm")
    assert "has no scaled_mm with blocks of 128" in blockscaled.refusal(FP8, CUDA)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weight": (E2M1_1X32,)}, "weight is e2m1_1x32, not e4m3_128x128"),
        ({"weight": ()}, "weight is in the type of the run, not e4m3_128x128"),
        ({"input": E2M1_1X32}, "input is e2m1_1x32, not e4m3_1x128"),
        ({"grad": None}, "grad is in the type of the run, not e4m3_1x128"),
        ({"wgrad_input": E4M3_128X128}, "wgrad_input is e4m3_128x128, not e4m3_128x1"),
        ({"wgrad_grad": None}, "wgrad_grad is in the type of the run, not e4m3_128x1"),
    ],
)
def test_other_formats_are_refused_and_named(monkeypatch: pytest.MonkeyPatch, change: Any, line: str) -> None:
    on_hopper(monkeypatch)
    assert blockscaled.refusal(replace(FP8, **change), CUDA) == line
