"""Proves that codes and scales are those of DeepSeek's reference casts and of an oracle that shares no code.

All codes, both sides of every boundary between scales, all ties, zeros, infinities and NaN, in every shape and type.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.oracles import formats as oracle
from tests.oracles import make_formats
from tests.trainer.precision.golden import golden, reference, stored, wrong
from trainer.precision.elements import (
    E2M1_1X32,
    E4M3_1X128,
    E4M3_128X1,
    E4M3_128X128,
    E4M3_OF_FP4,
    LARGEST,
    Element,
    Format,
    named,
)
from trainer.precision.formats import NAN_EXPONENT, Coded, decode, encode, encode_at, exponents, pack, rounded, unpack

FORMATS = (E4M3_1X128, E4M3_128X1, E4M3_128X128, E4M3_OF_FP4, E2M1_1X32)
ELEMENTS: tuple[Element, ...] = ("e4m3", "e2m1")
CODES = {"e4m3": 256, "e2m1": 16}
ONE = 127
"""The exponent of scale 1."""


def single(element: Element, floor: float = 0.0) -> Format:
    """Every number its own block."""
    return named(f"{element}_1x1", floor)


def same(found: Coded, expected: Coded) -> bool:
    return torch.equal(found.codes, expected.codes) and torch.equal(found.exponents, expected.exponents)


def equal(found: Tensor, expected: Tensor) -> bool:
    """Bit by bit, but for the many bits of NaN."""
    assert found.dtype == expected.dtype
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    both_nan = found.isnan() & expected.isnan()
    return found.shape == expected.shape and bool((both_nan | (found.view(bits) == expected.view(bits))).all())


def test_reference_casts(shared: Path) -> None:
    cases = reference(shared)
    assert len(cases) == 7 * 2 * 3
    assert {case.name: wrong(case) for case in cases if wrong(case)} == {}


def test_golden_set() -> None:
    assert {case.name: wrong(case) for case in golden() if wrong(case)} == {}


def test_the_golden_set_is_the_oracles_and_so_are_the_reference_casts(shared: Path) -> None:
    for case in (*golden(), *(case for case in reference(shared) if case.x.shape[1] != 256)):
        rows = case.x.tolist()
        codes, scales = oracle.encode(rows, case.format.element, case.format.block, case.format.floor)
        found = torch.tensor(codes, dtype=torch.uint8)
        packed = case.codes.shape != case.x.shape
        assert torch.equal(pack(found) if packed else found, case.codes), case.name
        assert scales == case.exponents.tolist(), case.name


def test_the_golden_set_has_all_ties_and_edges() -> None:
    for element in ELEMENTS:
        assert equal(stored()[f"ties_{element}.x"], make_formats.ties(element))
        assert equal(stored()[f"edges_{element}.x"], make_formats.edges(element))


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_of_all_codes_with_all_exponents(element: Element, dtype: torch.dtype) -> None:
    """Of bf16 and fp32 those that they hold; a code of NaN and an exponent of NaN give NaN."""
    codes = torch.arange(CODES[element], dtype=torch.uint8)
    numbers = torch.tensor([oracle.number(code, element) for code in codes.tolist()], dtype=torch.float64)
    for e in range(256):
        scale = math.nan if e == NAN_EXPONENT else 2.0 ** (e - 127)
        expected = (numbers * scale).float().to(dtype)
        found = decode(
            Coded(codes=codes, exponents=torch.tensor([[e]], dtype=torch.uint8)), named(f"{element}_1x256"), dtype
        )
        assert equal(found, expected), e


@pytest.mark.parametrize("element", ELEMENTS)
def test_all_codes_round_trip(element: Element) -> None:
    """With their own scale, in fp32 and bf16. A NaN makes its block NaN, which has codes of ones."""
    codes = torch.arange(CODES[element], dtype=torch.uint8).unsqueeze(1)
    format = single(element)
    for e, dtype in itertools.product(range(20, 240), (torch.float32, torch.bfloat16)):
        given = Coded(codes=codes, exponents=torch.full_like(codes, e))
        x = decode(given, format, dtype)
        nan = x.isnan()
        expected = Coded(
            codes=codes.masked_fill(nan, CODES[element] - 1),
            exponents=given.exponents.masked_fill(nan, NAN_EXPONENT),
        )
        assert same(encode_at(x, format, given.exponents), expected), (e, dtype)
    assert int(nan.sum()) == (2 if element == "e4m3" else 0)


@pytest.mark.parametrize("floor", [0.0, None])
@pytest.mark.parametrize("element", ELEMENTS)
def test_both_sides_of_every_boundary_between_scales(element: Element, floor: float | None) -> None:
    """Largest * 2^k and one ulp beside it for every k, subnormal numbers and the largest fp32 numbers included."""
    sizes = -make_formats.edges(element)[:, :1]
    ends = torch.tensor([[0.0], [2.0**-149], [torch.finfo(torch.float32).max], [make_formats.ulp_up(sizes).max()]])
    sizes = torch.cat((sizes, ends))
    assert len(sizes) > 3 * 260
    format = named(f"{element}_1x1", floor)
    expected = [[oracle.exponent(size, element, format.floor)] for (size,) in sizes.tolist()]
    assert exponents(sizes, format).tolist() == expected
    assert exponents(-sizes, format).tolist() == expected


@pytest.mark.parametrize("element", ELEMENTS)
def test_floors(element: Element) -> None:
    """Blocks below the floor have its scale, whatever is in them."""
    format = named(f"{element}_1x1")
    least = oracle.exponent(format.floor, element, 0.0)
    below = torch.tensor([[0.0], [-0.0], [2.0**-149], [format.floor / 3]])
    assert exponents(below, format).unique().tolist() == [least]
    assert exponents(torch.tensor([[format.floor * 2.5]]), format).item() > least
    assert encode(below[:2], format).codes.tolist() == [[0], [CODES[element] // 2]]


@pytest.mark.parametrize("element", ELEMENTS)
def test_ties_of_every_pair_of_neighbours(element: Element) -> None:
    """At the middle to the even code, one ulp beside it to the nearer, of both signs and at several scales."""
    middle = torch.tensor(oracle.middles(element))
    assert len(middle) == {"e4m3": 126, "e2m1": 7}[element]
    values = torch.cat((middle, make_formats.ulp_up(middle), make_formats.ulp_down(middle)))
    values = torch.cat((values, -values)).unsqueeze(1)
    expected = [[oracle.nearest(value, element)] for (value,) in values.tolist()]
    for e in (20, ONE - 1, ONE, 200):
        found = encode_at(values * 2.0 ** (e - ONE), single(element), torch.full_like(values, e, dtype=torch.uint8))
        assert found.codes.tolist() == expected, e


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_finite_number_saturates_at_a_scale_that_is_too_small(element: Element) -> None:
    largest = LARGEST[element]
    x = torch.tensor([[largest * 1.001], [-largest * 2], [largest * 1e30], [-torch.finfo(torch.float32).max]])
    found = encode_at(x, single(element), torch.full_like(x, ONE, dtype=torch.uint8))
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert torch.equal(decode(found, single(element)), signs * largest)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_a_block_that_is_not_finite_is_nan_as_a_whole_and_the_others_are_as_before(format: Format, bad: float) -> None:
    plain = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    x, (rows, columns) = plain.clone(), format.block
    x[130, 70] = bad
    inside = torch.zeros(256, 256, dtype=torch.bool)
    top, left = 130 // rows * rows, 70 // columns * columns
    inside[top : top + rows, left : left + columns] = True
    before = encode(plain, format)
    for found in (encode(x, format), encode_at(x, format, before.exponents)):
        assert decode(found, format)[inside].isnan().all()
        assert torch.equal(decode(found, format)[~inside], decode(before, format)[~inside])
        assert (found.exponents == NAN_EXPONENT).sum() == 1
        assert found.codes[inside].unique().tolist() == [CODES[format.element] - 1]


def test_fp64_beyond_fp32_is_not_cut_off() -> None:
    assert rounded(torch.tensor([[1e39, 1.0]], dtype=torch.float64), E2M1_1X32).isnan().all()


SHAPES = [
    (1,),
    (33,),
    (300,),
    (1, 1),
    (127, 129),
    (128, 128),
    (129, 257),
    (3, 5, 40),
    (2, 3, 130, 33),
    (0, 7),
    (2, 0, 9),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_shapes(format: Format, shape: tuple[int, ...]) -> None:
    """Leading dims are separate matrices, one dim is a row; memory may lie in any order."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    found = encode(x, format)
    rows, columns = (1, *shape)[-2:]
    blocks = math.ceil(rows / format.block[0]), math.ceil(columns / format.block[1])
    assert (found.codes.shape, found.exponents.shape) == (x.shape, (*shape[:-2], *blocks))
    assert (found.codes.dtype, found.exponents.dtype) == (torch.uint8, torch.uint8)
    for i, matrix in enumerate(x.reshape(-1, rows, columns) if x.numel() else ()):
        codes, scales = oracle.encode(matrix.tolist(), format.element, format.block, format.floor)
        assert found.codes.view(-1, rows, columns)[i].tolist() == codes
        assert found.exponents.view(-1, *blocks)[i].tolist() == scales
    strange = x.new_empty(*shape[::-1]).permute(*reversed(range(len(shape)))).copy_(x)
    assert same(encode(strange, format), found)
    assert torch.equal(decode(found, format), rounded(x, format))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_types(format: Format) -> None:
    """bf16 is exact in fp32; fp64 is rounded to it once; the result has the type of what is rounded."""
    x = torch.randn(130, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert same(encode(x, format), encode(x.float(), format))
    assert same(encode(x.bfloat16(), format), encode(x.bfloat16().float(), format))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert rounded(x.to(dtype), format).dtype == dtype


def test_the_input_is_left_as_it_is_and_no_gradient_is_asked_for() -> None:
    for format in FORMATS:
        x = torch.randn(40, 160, requires_grad=True)
        before = x.detach().clone()
        encode(x, format), encode_at(x, format, exponents(x, format)), rounded(x, format)
        assert torch.equal(x.detach(), before)


def test_packing() -> None:
    """Two codes per byte, the even column in the low nibble; a last one alone has 0 beside it."""
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert len(pack(pairs).unique()) == 256
    for columns in (1, 2, 31, 64):
        codes = torch.randint(0, 16, (3, 5, columns), dtype=torch.uint8)
        packed = pack(codes)
        assert packed.shape == (3, 5, math.ceil(columns / 2))
        assert torch.equal(unpack(packed, columns), codes)
        assert torch.equal(unpack(packed.view(torch.int8), columns), codes)
