"""Proves that stochastic rounding takes one of the two neighbours, with a mean without bias, as its purpose says."""

import math

import torch

from optim.rounding import generator_of, stochastic_bf16

CPU = torch.device("cpu")


def numbers(count: int = 4000) -> torch.Tensor:
    """Of many sizes and both signs."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=draw) * 10.0 ** torch.randint(-20, 20, (count,), generator=draw)


def rounded(x: torch.Tensor, *purpose: object) -> torch.Tensor:
    return stochastic_bf16(x, generator_of(1, *purpose, device=CPU))


def test_each_is_one_of_its_neighbours() -> None:
    x = numbers()
    y = rounded(x, 0).float()
    down = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = (down.view(torch.int32) + (1 << 16)).view(torch.float32)
    assert bool(((y == down) | (y == up)).all())
    assert bool((y == up).any())
    assert bool((y == down).any())


def test_what_bf16_holds_stays() -> None:
    x = numbers().bfloat16()
    assert torch.equal(rounded(x.float(), 0), x)
    assert torch.equal(rounded(torch.tensor([0.0, -0.0]), 0).view(torch.int16), torch.tensor([0, -(1 << 15)]).short())


def test_what_is_no_number_stays_none() -> None:
    """Also the NaN of a GPU, all ones, and its negative; else a gradient that is none would be 0 for its owner."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32)
    assert bool(rounded(bits.repeat(100).view(torch.float32), 0).isnan().all())
    assert rounded(torch.tensor([torch.inf, -torch.inf]), 0).tolist() == [torch.inf, -torch.inf]


def test_the_mean_is_the_number() -> None:
    """Against nearest rounding, whose mean is off by up to half a unit, however often it is repeated."""
    x, repeats = torch.full((20000,), 1 + 0.3 * 2.0**-7), 20
    means = [rounded(x, number).double().mean().item() for number in range(repeats)]
    mean = math.fsum(means) / repeats
    unit = 2.0**-7
    # Each draw is 0 or 1 unit above 1, with a standard deviation of sqrt(0.3 * 0.7) units: five standard errors.
    slack = 5 * unit * math.sqrt(0.21 / (len(x) * repeats))
    assert abs(mean - x[0].item()) < slack
    assert abs(x.bfloat16().double().mean().item() - x[0].item()) > 10 * slack


def test_bits_are_a_function_of_seed_and_purpose() -> None:
    x = numbers()
    assert torch.equal(rounded(x, 3, "layers.0"), rounded(x, 3, "layers.0"))
    assert not torch.equal(rounded(x, 3, "layers.0"), rounded(x, 3, "layers.1"))
    assert not torch.equal(rounded(x, 3, "layers.0"), rounded(x, 4, "layers.0"))
