"""Proves what holds for all numbers and shapes: rounding once is enough, codes come back, one axis after the other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import formats as oracle
from trainer.precision.elements import E2M1_1X32, E4M3_1X128, E4M3_128X1, E4M3_128X128, E4M3_OF_FP4, Format, named
from trainer.precision.formats import Coded, block_amax, decode, encode, encode_at, exponents, rounded, scaled, scales

FORMATS = (E4M3_1X128, E4M3_128X1, E4M3_128X128, E4M3_OF_FP4, E2M1_1X32, named("e4m3_1x64"), named("e2m1_3x5", 0.0))
SMALLEST, LARGEST = 2.0**-149, 2.0**127 * 1.5
"""Of fp32's numbers; those beyond 1.75 * 2^127 can round up to 2^128, which has a test of its own."""
DTYPES = (torch.float32, torch.bfloat16)

formats = st.sampled_from(FORMATS)
dtypes = st.sampled_from(DTYPES)


@st.composite
def matrices(draw: Any) -> Tensor:
    """Of any small shape: plain numbers, or magnitudes from the smallest to the largest side by side; some chosen."""
    rows, columns = draw(st.integers(1, 140)), draw(st.integers(1, 140))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    spread = draw(st.sampled_from([0.0, 3.0, 40.0]))
    exponent = torch.randn(rows, columns, generator=seeded) * spread + draw(st.integers(-149, 120))
    x = (torch.randn(rows, columns, generator=seeded, dtype=torch.float64) * exponent.double().exp2()).float()
    x = x.clamp(-LARGEST, LARGEST)
    sizes = st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from(
        [0.0, -0.0, SMALLEST, -SMALLEST, LARGEST, 448.0, 6.0]
    )
    for size in draw(st.lists(sizes, max_size=8)):
        x[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = size
    return x


@given(matrices(), formats)
@settings(deadline=None, max_examples=60)
def test_as_the_oracle_has_it(x: Tensor, format: Format) -> None:
    x = x[:40, :70]
    codes, scale = oracle.encode(x.tolist(), format.element, format.block, format.floor)
    found = encode(x, format)
    assert (found.codes.tolist(), found.exponents.tolist()) == (codes, scale)
    expected = torch.tensor(oracle.decode(codes, scale, format.element, format.block), dtype=torch.float64)
    assert torch.equal(decode(found, format).double(), expected), "decoding is exact in fp32"


@given(matrices(), formats, dtypes)
@settings(deadline=None, max_examples=100)
def test_rounded_twice_is_rounded_once(x: Tensor, format: Format, dtype: torch.dtype) -> None:
    """In bf16 too, whose subnormal numbers begin at 2^-133: below, it rounds once more itself."""
    once = rounded(x.to(dtype), format)
    assert torch.equal(rounded(once, format), once)


@given(matrices(), formats)
@settings(deadline=None, max_examples=60)
def test_signs_and_errors(x: Tensor, format: Format) -> None:
    """Signs stay, zeros' too; an error is at most half of what lies between neighbours of this size."""
    found = rounded(x, format)
    assert torch.equal(found.signbit(), x.signbit())
    scale = scales(exponents(x, format))
    mantissa, least = (3, 2.0**-6) if format.element == "e4m3" else (1, 1.0)
    size = scaled(torch.ones_like(x), scale, format.block).double()
    step = ((x.double() / size).abs().clamp_min(least).log2().floor() - mantissa).exp2() * size
    assert ((found.double() - x.double()).abs() <= step / 2).all()


@given(matrices(), formats)
@settings(deadline=None, max_examples=60)
def test_no_number_is_beyond_the_largest_and_no_scale_is_larger_than_it_must_be(x: Tensor, format: Format) -> None:
    found, largest = encode(x, format), oracle.numbers(format.element)[-1]
    scale = scales(found.exponents).double()
    amax = block_amax(x, format.block).double().clamp_min(format.floor)
    assert (amax <= largest * scale).all()
    assert ((amax > largest * scale / 2) | (found.exponents == 0)).all()


def codes_of(format: Format, seed: int, rows: int, columns: int, most: int) -> Coded:
    """Random codes up to `most`, with signs, and exponents that no amax decided, such that bf16 holds all numbers."""
    draw = torch.Generator().manual_seed(seed)
    half = 2 ** sum(oracle.ELEMENTS[format.element])
    codes = torch.randint(0, most + 1, (rows, columns), generator=draw)
    codes += half * torch.randint(0, 2, (rows, columns), generator=draw)
    blocks = -(-rows // format.block[0]), -(-columns // format.block[1])
    scale = torch.randint(10, 240, blocks, generator=draw)
    return Coded(codes=codes.to(torch.uint8), exponents=scale.to(torch.uint8))


@given(formats, st.integers(0, 2**30), st.integers(1, 140), st.integers(1, 140), st.floats(0, 1), dtypes)
@settings(deadline=None, max_examples=100)
def test_codes_come_back_at_their_own_scale(
    format: Format, seed: int, rows: int, columns: int, part: float, dtype: torch.dtype
) -> None:
    """What a released file has comes back byte by byte, whatever scales its makers chose."""
    finite = len(oracle.numbers(format.element)) - 1
    given = codes_of(format, seed, rows, columns, int(part * finite))
    x = decode(given, format, dtype)
    assert torch.equal(x.float(), decode(given, format)), "bf16 holds them"
    assert torch.equal(decode(given, format, torch.float64).float(), decode(given, format))
    found = encode_at(x, format, given.exponents)
    assert torch.equal(found.codes, given.codes)
    assert torch.equal(found.exponents, given.exponents)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_a_fresh_encoding_of_the_same_numbers_may_have_other_codes(format: Format) -> None:
    """So the test above is about something: blocks of small codes get a smaller scale, the numbers are the same."""
    given = codes_of(format, 0, 128, 128, most=4 if format.element == "e4m3" else 3)
    x = decode(given, format)
    found = encode(x, format)
    at_once = encode(x, replace(format, floor=0.0))
    assert not torch.equal(found.codes, given.codes)
    assert (found.exponents != given.exponents).any()
    assert torch.equal(decode(at_once, format), x)


def relative_error(found: Tensor, x: Tensor) -> float:
    return float((found.double() - x.double()).norm() / x.double().norm())


def with_fp32_scales(x: Tensor, dim: int) -> Tensor:
    """Rounded to E4M3 with scales amax / 448, blocks of 128 along a dim."""
    blocks = x.unflatten(dim, (-1, 128))
    scale = blocks.abs().amax(dim + 1, keepdim=True) / 448
    return ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(dim, dim + 1)


@pytest.mark.parametrize("kind", ["normal", "columns far larger", "rows of many sizes"])
def test_rounding_along_rows_and_then_along_columns_costs_nothing(kind: str) -> None:
    """So the codes of a product's input serve for the gradient of its weight.

    Relative errors are 2.65 % by columns alone and 2.65 % after rows; they differ by 1e-9 of themselves (numbers that
    the first rounding made zeros, or that were rounded at a coarser scale, two in a thousand at most). With scales that
    are no powers of two they grow by 17 % and more, which a limit of 1e-6 tells apart.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=draw)
    if kind == "columns far larger":
        x[:, ::37] *= 50
    if kind == "rows of many sizes":
        x *= torch.randn(512, 1, generator=draw).mul(2).exp2()
    columns, both = rounded(x, E4M3_128X1), rounded(rounded(x, E4M3_1X128), E4M3_128X1)
    assert relative_error(both, x) == pytest.approx(relative_error(columns, x), rel=1e-6)
    assert float((both != columns).float().mean()) < 0.005
    alone, after = with_fp32_scales(x, 0), with_fp32_scales(with_fp32_scales(x, 1), 0)
    assert relative_error(after, x) > 1.1 * relative_error(alone, x), "scales of any size do cost"


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_what_rounds_up_beyond_fp32_is_infinite(format: Format) -> None:
    """As everywhere in fp32; nothing is cut off without a word."""
    x = torch.tensor([[torch.finfo(torch.float32).max, -(2.0**127)]])
    found = encode(x, format)
    assert decode(found, format).tolist() == [[float("inf"), -(2.0**127)]]
    assert oracle.decode(found.codes.tolist(), found.exponents.tolist(), format.element, (1, 2))[0][0] == 2.0**128


def test_scales_are_powers_of_two_bit_by_bit() -> None:
    found = scales(torch.arange(256, dtype=torch.uint8)).double()
    assert found[:255].tolist() == [2.0 ** (e - 127) for e in range(255)]
    assert found[255].isnan()
