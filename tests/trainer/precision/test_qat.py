"""Proves when the cast of FP4 weights to FP8 changes nothing, on both sides of 2^14, and what the rotation does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import formats as oracle
from trainer.precision import qat
from trainer.precision.elements import E2M1_1X32, E4M3_128X128, E4M3_OF_FP4
from trainer.precision.formats import NAN_EXPONENT, Coded, decode, encode, rounded
from trainer.precision.qat import hadamard, inexact_tiles, lossless_by_scales

ALL_CODES = torch.arange(32, dtype=torch.uint8) % 16


def tile_of(*scales: int) -> Coded:
    """Rows of sub-blocks with every code and these exponents, in one tile."""
    exponents = torch.tensor(scales, dtype=torch.uint8).unsqueeze(1)
    return Coded(codes=ALL_CODES.repeat(len(scales), 1), exponents=exponents)


def changed_by_oracle(coded: Coded) -> bool:
    """Whether a number of a tile is none of E4M3 with the tile's scale, number by number."""
    x = decode(coded, E2M1_1X32).tolist()
    codes, exponents = oracle.encode(x, "e4m3", (128, 128), 0.0)
    return oracle.decode(codes, exponents, "e4m3", (128, 128)) != x


@pytest.mark.parametrize("largest", [16, 100, 127, 200])
@pytest.mark.parametrize("gap", range(17))
def test_exact_up_to_a_ratio_of_2_to_the_14(gap: int, largest: int) -> None:
    coded = tile_of(largest, largest - gap // 2, largest - gap)
    for dtype in (torch.float32, torch.bfloat16):
        assert inexact_tiles(decode(coded, E2M1_1X32, dtype)) == int(gap > 14)
    assert lossless_by_scales(coded).tolist() == [[gap <= 14]]
    assert changed_by_oracle(coded) == (gap > 14)


def test_small_numbers_that_a_floor_would_change() -> None:
    """So FP4 weights are cast without one, down to the smallest scales."""
    for e in (0, 1, 5, 14, 90):
        x = decode(tile_of(e, e + 3), E2M1_1X32)
        assert inexact_tiles(x) == 0
        assert inexact_tiles(x, E4M3_128X128) == 1


@pytest.mark.parametrize("smallest", [1, 2, 3, 4, 5, 6, 7])
def test_beyond_the_ratio_it_depends_on_the_numbers(smallest: int) -> None:
    """Of the sub-block with the smallest scale: 0.5 and 1.5 change at 2^15, 1 and 3 at 2^16, others later."""
    number = oracle.number(smallest, "e2m1")
    most = 14 + next(k for k in range(4) if number % 2.0**k)
    for gap in (15, 16, 17, 18):
        codes = torch.tensor([[7], [smallest]], dtype=torch.uint8).expand(2, 32)
        coded = Coded(codes=codes, exponents=torch.tensor([[127], [127 - gap]], dtype=torch.uint8))
        assert inexact_tiles(decode(coded, E2M1_1X32)) == int(gap > most)
        assert not lossless_by_scales(coded).any()


def test_sub_blocks_of_zeros_do_not_count() -> None:
    coded = tile_of(120, 1, 119)
    coded.codes[1] &= 8
    assert lossless_by_scales(coded).all()
    assert inexact_tiles(decode(coded, E2M1_1X32)) == 0
    coded.codes.fill_(0)
    assert lossless_by_scales(coded).all()


def test_a_nan_is_no_exact_tile() -> None:
    for scales in ((NAN_EXPONENT, 250), (NAN_EXPONENT, NAN_EXPONENT)):
        assert inexact_tiles(decode(tile_of(*scales), E2M1_1X32)) == 1
        assert not lossless_by_scales(tile_of(*scales)).any()


def spread_weights(seed: int, spread: float, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers whose sub-blocks have sizes that differ by about 2^spread."""
    draw = torch.Generator().manual_seed(seed)
    blocks = (*shape[:-1], -(-shape[-1] // 32))
    size = (torch.randn(blocks, generator=draw) * spread).exp2().repeat_interleave(32, -1)[..., : shape[-1]]
    return torch.randn(shape, generator=draw) * size * 0.02


@given(st.integers(0, 2**30), st.floats(0, 5), st.sampled_from([(128, 128), (130, 200), (2, 70, 300), (5,)]))
@settings(deadline=None, max_examples=50)
def test_what_scales_say_is_true(seed: int, spread: float, shape: tuple[int, ...]) -> None:
    """Tile by tile: as many as are not proven exact may change, no more."""
    x = rounded(spread_weights(seed, spread, shape), E2M1_1X32)
    exact = lossless_by_scales(encode(x, E2M1_1X32))
    count = inexact_tiles(x)
    assert count <= int((~exact).sum())
    same = rounded(x, E4M3_OF_FP4) == x
    rows, columns = (1, *shape)[-2:]
    of_tile = exact.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
    assert same[of_tile.reshape(same.shape)].all()
    assert bool(count) == bool((~same).any())


def test_both_kinds_of_tiles_are_there() -> None:
    """Of the random ones above, so they prove something; and each is counted once."""
    x = rounded(spread_weights(0, 2.3, (2, 512, 512)), E2M1_1X32)
    exact = lossless_by_scales(encode(x, E2M1_1X32))
    assert exact.shape == (2, 4, 4)
    assert 0 < int(exact.sum()) < 32
    assert 0 < inexact_tiles(x) <= int((~exact).sum())
    assert inexact_tiles(rounded(spread_weights(0, 0.0, (512, 512)), E2M1_1X32)) == 0, "ordinary weights"


def sylvester(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / n**0.5


@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_rotation(n: int) -> None:
    """The matrix of the definition, forwards and backwards, in the type of its argument."""
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(hadamard(x), x @ sylvester(n), rtol=0, atol=1e-14)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-14)
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((hadamard(x) * weight).sum(), x)
    torch.testing.assert_close(grad, weight @ sylvester(n).T, rtol=0, atol=1e-14)
    low = x.detach().bfloat16()
    assert torch.equal(hadamard(low), hadamard(low.float()).bfloat16()), "rounded once"
    assert hadamard(low.float()).dtype == torch.float32


def test_rotation_makes_fp4_lose_less_of_a_row_with_one_large_channel() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[:, ::32] *= 30
    plain = (rounded(x, E2M1_1X32) - x).norm()
    turned = (hadamard(rounded(hadamard(x), E2M1_1X32)) - x).norm()
    assert turned < 0.7 * plain


@pytest.mark.parametrize("n", [0, 3, 96])
def test_rotation_of_no_power_of_two_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"channels = {n}: expected a power of two"):
        hadamard(torch.zeros(2, n))


@pytest.mark.parametrize("wrong", [13, 15])
def test_another_limit_is_seen(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat, "LOSSLESS_LOG2", wrong)
    agree = [
        bool(lossless_by_scales(tile_of(127, 127 - gap))) != changed_by_oracle(tile_of(127, 127 - gap))
        for gap in (14, 15)
    ]
    assert not all(agree)
