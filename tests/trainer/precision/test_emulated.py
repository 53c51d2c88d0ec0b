"""Proves that the emulated products are those of the rounded operands, forwards and backwards, whatever the shapes."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import group_products
from model.experts import grouped_matmul
from trainer.precision import emulated
from trainer.precision.elements import E2M1_1X32, E4M3_1X128, E4M3_128X1, E4M3_128X128, named
from trainer.precision.formats import rounded
from trainer.precision.health import Watch
from trainer.precision.recipe import PLAIN, Formats

E4M3_1X32, E4M3_32X1 = named("e4m3_1x32"), named("e4m3_32x1")
FP8 = Formats(weight=(E4M3_128X128,), input=E4M3_1X128, grad=E4M3_1X128, wgrad_input=E4M3_128X1, wgrad_grad=E4M3_128X1)
SHAPES = [(256, 256, 128), (130, 200, 96), (1, 32, 32), (7, 129, 257)]
"""Tokens, channels in and out: whole blocks, ragged ones, a single token."""
EXACT = 2e-15
"""Of fp64 sums of a few hundred products of numbers of 4 bits, relative to the sum of their magnitudes."""


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of all sizes between blocks: each has another scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-6, 6, shape[:-1], generator=generator)).unsqueeze(-1)).to(dtype)


def passed(product: Callable[..., Tensor], grad: Tensor, *tensors: Tensor, **named: Any) -> tuple[Tensor, ...]:
    """What comes out, and the gradients of x and the weight."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = product(*leaves, **named)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def close(found: Tensor, left: Tensor, right: Tensor) -> None:
    """found is left @ right to the rounding of fp64 sums."""
    bound = left.abs().double() @ right.abs().double()
    assert ((found.double() - left.double() @ right.double()).abs() <= EXACT * bound).all()


@pytest.mark.parametrize(("P", "C", "F"), SHAPES)
def test_three_products_of_rounded_operands(P: int, C: int, F: int) -> None:
    """fprop, dgrad and wgrad are fp64 products of what the formats' own codes decode to."""
    x, w = numbers(P, C, seed=1), rounded(numbers(F, C, seed=2), E4M3_128X128)
    grad = numbers(P, F, seed=3)
    y, grad_x, grad_w = passed(emulated.linear(FP8, Watch()), grad, x, w)
    taken = rounded(x, E4M3_1X128)
    close(y, taken, w.T)
    close(grad_x, rounded(grad, E4M3_1X128), w)
    close(grad_w, rounded(grad, E4M3_128X1).T, rounded(taken, E4M3_128X1))


def test_dgrad_has_a_weight_of_its_own() -> None:
    """Rounded from what `weight` left; fprop and wgrad do not know of it. Of linears and of experts."""
    formats = replace(FP8, dgrad_weight=E4M3_32X1)
    x, w, grad = numbers(70, 96, seed=1), rounded(numbers(64, 96, seed=2), E4M3_1X32), numbers(70, 64, seed=3)
    taken = rounded(w, E4M3_32X1)
    assert not torch.equal(taken, w)
    own, plain = (passed(emulated.linear(one, Watch()), grad, x, w) for one in (formats, FP8))
    close(own[1], rounded(grad, E4M3_1X128), taken)
    assert torch.equal(own[0], plain[0])
    assert torch.equal(own[2], plain[2])
    grouped = passed(emulated.grouped(formats, Watch()), grad, x, w.unsqueeze(0), counts=[70])
    close(grouped[1], rounded(grad, E4M3_1X128), taken)


@pytest.mark.parametrize("without", ["input", "grad", "wgrad_input", "wgrad_grad"])
def test_an_operand_without_a_format_is_taken_as_it_is(without: str) -> None:
    """Each of the four operands is rounded by its own field and by no other."""
    formats = replace(FP8, **{without: None})
    x, w, grad = numbers(130, 96, seed=1), numbers(64, 96, seed=2), numbers(130, 64, seed=3)
    round_by = {key: getattr(formats, key) for key in ("input", "grad", "wgrad_input", "wgrad_grad")}

    def taken(key: str, tensor: Tensor) -> Tensor:
        return tensor if round_by[key] is None else rounded(tensor, round_by[key])

    y, grad_x, grad_w = passed(emulated.linear(formats, Watch()), grad, x, w)
    close(y, taken("input", x), w.T)
    close(grad_x, taken("grad", grad), w)
    close(grad_w, taken("wgrad_grad", grad).T, taken("wgrad_input", taken("input", x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_operands_are_exact_in_the_type_of_the_run(dtype: torch.dtype) -> None:
    """A product in bf16 or fp32 has the very operands that fp64 has: only its sums are rounded."""
    x, w = numbers(64, 256, seed=1, dtype=dtype), rounded(numbers(32, 256, seed=2, dtype=dtype), E4M3_128X128)
    y = emulated.linear(FP8, Watch())(x, w)
    exact = emulated.linear(FP8, Watch())(x.double(), w.double())
    bound = rounded(x, E4M3_1X128).abs().double() @ w.abs().double().T
    # An fp32 sum of 256 exact products, then one rounding to the type.
    limit = 256 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= limit * bound).all()


def test_without_formats_the_bits_are_those_of_the_plain_product() -> None:
    """The same function with nothing to round is the plain one, forwards and backwards."""
    x, w = numbers(33, 64, seed=1, dtype=torch.float32), numbers(16, 64, seed=2, dtype=torch.float32)
    grad = numbers(33, 16, seed=3, dtype=torch.float32)
    found = passed(emulated.linear(PLAIN, Watch()), grad, x, w)
    plain = passed(torch.nn.functional.linear, grad, x, w)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


COUNTS = [[5, 0, 130, 128, 1], [0, 0, 0, 0, 0], [264, 0, 0, 0, 0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_are_linears_of_their_own_rows(counts: list[int]) -> None:
    """Each expert's three products are those of `linear` on its rows alone: no block has rows of two experts."""
    x, grad = numbers(sum(counts), 96, seed=1), numbers(sum(counts), 64, seed=2)
    w = rounded(numbers(len(counts), 64, 96, seed=3), E4M3_128X128)
    y, grad_x, grad_w = passed(emulated.grouped(FP8, Watch()), grad, x, w, counts=counts)
    for expert, (first, last) in enumerate(pairwise([0, *accumulate(counts)])):
        if first == last:
            assert not grad_w[expert].any()
            continue
        alone = passed(emulated.linear(FP8, Watch()), grad[first:last], x[first:last], w[expert])
        for found, own in zip((y[first:last], grad_x[first:last], grad_w[expert]), alone, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-13, atol=1e-13)


def test_maps_side_by_side_are_linears_of_their_own_channels() -> None:
    """wo_a: a group's blocks are of its own channels and rows."""
    x, w, grad = numbers(1, 70, 3, 40, seed=1), numbers(3, 24, 40, seed=2), numbers(1, 70, 3, 24, seed=3)
    y, grad_x, grad_w = passed(emulated.side_by_side(FP8, Watch()), grad, x, w)
    for group in range(3):
        alone = passed(emulated.linear(FP8, Watch()), grad[:, :, group], x[:, :, group], w[group])
        for found, own in zip((y[:, :, group], grad_x[:, :, group], grad_w[group]), alone, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("product", "plain", "shapes", "named"),
    [
        (emulated.linear, torch.nn.functional.linear, [(5, 16), (8, 16), (5, 8)], {}),
        (emulated.side_by_side, group_products, [(2, 5, 3, 16), (3, 8, 16), (2, 5, 3, 8)], {}),
        (emulated.grouped, grouped_matmul, [(9, 16), (3, 8, 16), (9, 8)], {"counts": [4, 0, 5]}),
    ],
    ids=["linear", "side_by_side", "grouped"],
)
def test_numbers_that_formats_hold_have_the_plain_gradient(
    product: Any, plain: Any, shapes: list[tuple[int, ...]], named: dict[str, Any]
) -> None:
    """Straight through: where rounding changes nothing, all three results are those of the unrounded product."""
    generator = torch.Generator().manual_seed(1)
    x, w, grad = (torch.randint(-8, 9, shape, generator=generator).double() for shape in shapes)
    found, expected = passed(product(FP8, Watch()), grad, x, w, **named), passed(plain, grad, x, w, **named)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_inputs_are_kept_as_codes() -> None:
    """Between the passes an input takes a byte per number and its scales, where bf16 takes two."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, w = (numbers(*shape, seed=1, dtype=torch.bfloat16).requires_grad_() for shape in ((256, 128), (64, 128)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        emulated.linear(FP8, Watch())(x, w)
    sizes = sorted(tensor.nbytes for tensor in kept if tensor.data_ptr() != w.data_ptr())
    assert sizes == [2 * 128, 256 * 128]


@pytest.mark.parametrize(
    ("product", "x", "w", "named"),
    [
        (emulated.linear, (3, 16), (8, 16), {}),
        (emulated.side_by_side, (3, 2, 16), (2, 8, 16), {}),
        (emulated.grouped, (3, 16), (2, 8, 16), {"counts": [1, 2]}),
    ],
    ids=["linear", "side_by_side", "grouped"],
)
def test_without_gradients_an_input_is_rounded_once(
    product: Any, x: tuple[int, ...], w: tuple[int, ...], named: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample's single token is not filled up to a block of tokens for a gradient that nobody asks for."""
    given, weight, made = numbers(*x, seed=1), numbers(*w, seed=2).requires_grad_(), []
    encode = emulated.encode
    monkeypatch.setattr(emulated, "encode", lambda one, format: made.append(format.name) or encode(one, format))
    with torch.no_grad():
        y = product(FP8, Watch())(given, weight, **named)
    assert made == ["e4m3_1x128"]
    assert torch.equal(y, product(FP8, Watch())(given, weight, **named))
    assert made == ["e4m3_1x128", "e4m3_1x128", "e4m3_128x1"]


def test_a_number_that_is_none_is_seen_in_the_product() -> None:
    """An infinity in one token makes its own results NaN and leaves those of the others as they are."""
    x, w = numbers(4, 128, seed=1, dtype=torch.float32), numbers(8, 128, seed=2, dtype=torch.float32)
    clean = emulated.linear(FP8, Watch())(x, w)
    x[2, 5] = torch.inf
    y = emulated.linear(FP8, Watch())(x, w)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


kept, one_rounding = emulated._kept, emulated.cast


def along_rows(x: Tensor, format: Any, operand: str, watch: Watch) -> Tensor:
    return one_rounding(x, E4M3_1X128 if operand == "wgrad_grad" else format, operand, watch)


def unrounded(x: Tensor, format: Any, operand: str, watch: Watch) -> Tensor:
    return x if operand == "grad" else one_rounding(x, format, operand, watch)


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "wgrad's gradient in blocks along rows": (emulated, "cast", along_rows),
    "dgrad of the unrounded gradient": (emulated, "cast", unrounded),
    "blocks of two experts": (emulated.math, "lcm", lambda *blocks: 1),
    "wgrad of another input": (emulated, "_kept", lambda taken, formats: kept(taken * 1.05, formats)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above fail where one thing is wrong."""
    monkeypatch.setattr(*MISTAKES[name])
    of_experts = name == "blocks of two experts"
    check, given = (
        (test_experts_are_linears_of_their_own_rows, ([130, 40, 128],))
        if of_experts
        else (test_three_products_of_rounded_operands, SHAPES[1])
    )
    # An expert's rows alone are the reference, so that only what mixes experts is seen there.
    with pytest.raises(AssertionError):
        check(*given)


def test_weights_of_fp4_are_exact_in_fp8() -> None:
    """What an FP4 expert multiplies with is its FP4 numbers: the cast to FP8 changes none (within 2^14 of scales)."""
    master = numbers(256, 256, seed=5, dtype=torch.float32)
    fp4 = rounded(master, E2M1_1X32)
    assert torch.equal(rounded(fp4, replace(E4M3_128X128, floor=0.0)), fp4)
