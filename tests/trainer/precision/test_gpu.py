"""Proves, on a Hopper GPU, that codes are a CPU's and that each back end's products are the emulated ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.trainer.precision.golden import golden
from tests.trainer.precision.hopper import FP8, operands
from trainer.precision import backends
from trainer.precision.backends import Products
from trainer.precision.elements import E2M1_1X32, E4M3_1X128, E4M3_128X1, E4M3_128X128, Format
from trainer.precision.formats import decode, encode
from trainer.precision.health import Watch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
EMULATED = backends.products_of("emulated")
COUNTS = [5, 0, 300, 256, 1, 1024]
LIMITS = {torch.bfloat16: 4e-3, torch.float32: 1e-3}
"""|found - emulated| / |emulated|. bf16: both results are rounded to 2^-9. fp32: Hopper sums FP8 products of a block in
fewer bits than fp32 has; how many no one has measured here yet."""
SIZES = [(4096, 2048), (2048, 4096), (640, 384), (200, 72)]


@pytest.fixture(params=["torch", "te"])
def back(request: pytest.FixtureRequest) -> Products:
    """Those of a back end; without Transformer Engine, or on another GPU, its tests are skipped."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    reason = backends.module(request.param).refusal(FP8, CUDA)
    if "not installed" in reason:
        pytest.skip(reason)
    assert reason == ""
    return backends.products_of(request.param)


def three(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """y, dx and dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = product(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def experts(back: Products, counts: list[int], given: dict[str, Tensor]) -> list[Tensor]:
    return three(lambda x, w: back.grouped(FP8, Watch())(x, w, counts), **given)


def apart(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    return {
        name: float((one.double() - other.double()).norm() / other.double().norm())
        for name, one, other in zip(("y", "dx", "dW"), found, expected, strict=True)
    }


@pytest.mark.parametrize("format", [E4M3_1X128, E4M3_128X1, E4M3_128X128, E2M1_1X32], ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_and_scales_are_those_of_a_cpu(format: Format, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    steps = torch.randint(-40, 40, (520, 40), generator=draw).float().exp2().repeat_interleave(32, 1)
    x = (torch.randn(520, 1280, generator=draw) * steps).to(dtype)
    x[3, 7], x[400, 900], x[10] = torch.inf, torch.nan, 0
    here, there = encode(x, format), encode(x.to(CUDA), format)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.exponents, there.exponents.cpu())
    values, on_gpu = decode(here, format), decode(there, format).cpu()
    # The bits of a NaN are the device's own: a GPU's products make one of ones, a CPU's hand on that of an operand.
    assert torch.equal(values.isnan(), on_gpu.isnan())
    bits, bits_on_gpu = (one.masked_fill(one.isnan(), 0).view(torch.int32) for one in (values, on_gpu))
    assert torch.equal(bits, bits_on_gpu)


def test_codes_and_scales_are_those_of_the_golden_set() -> None:
    for case in golden():
        found = encode(case.x.to(CUDA), case.format)
        assert torch.equal(found.codes.cpu(), encode(case.x, case.format).codes), case.name
        assert torch.equal(found.exponents.cpu(), case.exponents), case.name


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("D", "out"), SIZES)
def test_experts_products_are_the_emulated_ones(back: Products, D: int, out: int, dtype: torch.dtype) -> None:
    given = operands(COUNTS, D, out, dtype, "cuda")
    found, expected = experts(back, COUNTS, given), experts(EMULATED, COUNTS, given)
    assert max(apart(found, expected).values()) < LIMITS[dtype], apart(found, expected)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("P", [1, 77, 4096])
def test_linear_maps_are_the_emulated_ones(back: Products, P: int, dtype: torch.dtype) -> None:
    given = operands([P], 4096, 1536, dtype, "cuda")
    given["weight"] = given["weight"][0]
    found, expected = (three(one.linear(FP8, Watch()), **given) for one in (back, EMULATED))
    assert max(apart(found, expected).values()) < LIMITS[dtype], apart(found, expected)


def test_maps_side_by_side_are_the_emulated_ones(back: Products) -> None:
    given = operands([256] * 8, 4096, 1024, torch.bfloat16, "cuda")
    x, grad = (given[name].unflatten(0, (8, 2, 128)).permute(1, 2, 0, 3) for name in ("x", "grad"))
    found, expected = (three(one.side_by_side(FP8, Watch()), x, given["weight"], grad) for one in (back, EMULATED))
    assert max(apart(found, expected).values()) < LIMITS[torch.bfloat16]


def test_two_runs_have_the_same_bits(back: Products) -> None:
    given = operands(COUNTS, 2048, 1024, torch.bfloat16, "cuda")
    for one, other in zip(experts(back, COUNTS, given), experts(back, COUNTS, given), strict=True):
        assert torch.equal(one, other)


def test_an_experts_bits_are_of_its_own_rows(back: Products) -> None:
    given = operands(COUNTS, 2048, 1024, torch.bfloat16, "cuda")
    whole, rows = experts(back, COUNTS, given), slice(305, 561)
    alone = {"x": given["x"][rows], "weight": given["weight"], "grad": given["grad"][rows]}
    found = experts(back, [0, 0, 0, 256, 0, 0], alone)
    assert torch.equal(found[0], whole[0][rows])
    assert torch.equal(found[1], whole[1][rows])
    assert torch.equal(found[2][3], whole[2][3])


def test_what_is_not_finite_is_seen(back: Products) -> None:
    given = operands(COUNTS, 640, 384, torch.bfloat16, "cuda")
    given["x"][100, 200] = torch.inf
    found, expected = experts(back, COUNTS, given), experts(EMULATED, COUNTS, given)
    assert found[0].isnan().any()
    assert all(torch.equal(one.isnan(), other.isnan()) for one, other in zip(found, expected, strict=True))
