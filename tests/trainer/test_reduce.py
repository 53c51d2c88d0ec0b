"""The exact sum has the same bits in any order and any grouping, is right, and refuses what it cannot hold."""

import random
import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.parallel import reduce
from trainer.parallel.reduce import FRACTION_BITS, ExactSum

SHAPES = {"w": torch.Size((3, 5)), "b": torch.Size((7,))}


def leaves(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Leaves whose sizes differ by many powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(shape, generator=generator) * 10.0 ** (-4 * float(torch.rand((), generator=generator)))
            for name, shape in SHAPES.items()
        }
        for _ in range(count)
    ]


def add_all(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    total = ExactSum(SHAPES, torch.float32, torch.device("cpu"))
    for part in parts:
        for name, leaf in part.items():
            total.add(name, leaf)
    return total.result()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 12), order=st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(seed: int, count: int, order: random.Random) -> None:
    parts = leaves(seed, count)
    mixed = parts[:]
    order.shuffle(mixed)
    assert all(torch.equal(value, add_all(mixed)[name]) for name, value in add_all(parts).items())


def check_against_fractions(seed: int, sizes: list[float], dtype: torch.dtype) -> None:
    """Every leaf rounded to the unit, to even, and added as whole numbers, gives the sum to the bit."""
    generator = torch.Generator().manual_seed(seed)
    total = ExactSum(SHAPES, torch.float64, torch.device("cpu"))
    units = [0] * 7
    for size in sizes:
        leaf = ((torch.rand(7, generator=generator, dtype=torch.float64) * 2 - 1) * size).to(dtype)
        leaf[0] = size
        total.add("b", leaf)
        units = [
            unit + round(Fraction(value) * 2**FRACTION_BITS) for unit, value in zip(units, leaf.tolist(), strict=True)
        ]
    assert total.result()["b"].tolist() == [float(Fraction(unit, 2**FRACTION_BITS)) for unit in units]


SIZES = st.sampled_from(
    [0.0, 1e-30, 2.0**-49, 3 * 2.0**-49, 2.0**-26, 1e-7, 1e-3, 1.0, 7.999, -7.999, 8.0, 15.0, 900.0]
)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(SIZES, min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_each_leaf_is_rounded_to_the_unit_and_added_exactly(seed: int, sizes: list[float], dtype: torch.dtype) -> None:
    check_against_fractions(seed, sizes, dtype)


@pytest.mark.parametrize(
    ("name", "value"), [("REACH", 16.0), ("CENTRE", 16.0), ("CENTRE_BITS", reduce.CENTRE_BITS + 1), ("CENTRE", 48.0)]
)
def test_a_mistake_in_the_rounding_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    monkeypatch.setattr(reduce, name, value)
    with pytest.raises(AssertionError):
        check_against_fractions(0, [1e-3, 15.0, -15.0, 2.0**-26], torch.float64)
    with pytest.raises(AssertionError):
        check_against_fractions(0, [5.0, 2.0**-26, 15.0, 10.0], torch.float64)


def test_a_plain_sum_would_not() -> None:
    parts = leaves(0, 12)
    forwards = sum((part["w"] for part in parts[1:]), parts[0]["w"].clone())
    backwards = sum((part["w"] for part in parts[-2::-1]), parts[-1]["w"].clone())
    assert not torch.equal(forwards, backwards)


def test_the_sum_is_right() -> None:
    parts = leaves(1, 12)
    exact = sum(part["w"].double() for part in parts)
    # Twelve roundings to multiples of 2^-48 and one to fp32.
    bound = 12 * 2.0 ** -(FRACTION_BITS + 1) + exact.abs().max() * 2.0**-24
    assert (add_all(parts)["w"].double() - exact).abs().max() <= bound


def test_ties_round_to_even_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    half = 2.0 ** -(FRACTION_BITS + 1)
    total = ExactSum({"b": torch.Size((4,))}, torch.float64, torch.device("cpu"))
    total.add("b", torch.tensor([half, 3 * half, -half, 5 * half], dtype=torch.float64))
    assert torch.equal(total.result()["b"], torch.tensor([0.0, 4 * half, 0.0, 4 * half], dtype=torch.float64))
    parts = leaves(2, 3)
    before = add_all(parts)
    monkeypatch.setattr(reduce, "CHUNK", 2)
    assert all(torch.equal(value, before[name]) for name, value in add_all(parts).items())


def test_threads_may_add_at_the_same_time() -> None:
    parts = leaves(3, 64)
    total = ExactSum(SHAPES, torch.float32, torch.device("cpu"))

    def add(mine: list[dict[str, torch.Tensor]]) -> None:
        for part in mine:
            for name, leaf in part.items():
                total.add(name, leaf)

    threads = [threading.Thread(target=add, args=(parts[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(value, add_all(parts)[name]) for name, value in total.result().items())


def test_reset_starts_anew_and_bf16_leaves_are_promoted() -> None:
    total = ExactSum(SHAPES, torch.float32, torch.device("cpu"))
    total.add("w", torch.ones(3, 5))
    total.reset()
    total.add("b", torch.full((7,), 0.5, dtype=torch.bfloat16))
    assert torch.equal(total.result()["w"], torch.zeros(3, 5))
    assert torch.equal(total.result()["b"], torch.full((7,), 0.5))


def test_sums_that_ranks_bring_together_are_right_after_a_step_of_zeros() -> None:
    """Nobody's sum is touched then, so nobody's is added: what is known of each must still be true in the next step."""
    ranks = [ExactSum(SHAPES, torch.float32, torch.device("cpu")) for _ in range(2)]
    for value in (0.0, 0.25):
        for rank in ranks:
            rank.reset()
            rank.add("b", torch.full((7,), value))
        bounds_RP2 = torch.stack([rank.bounds() for rank in ranks])
        for rank in ranks:
            rank.merge(bounds_RP2, {})
        if ranks[0].is_touched("b"):
            ranks[0].totals()["b"].add_(ranks[1].totals()["b"])
    assert torch.equal(ranks[0].result()["b"], torch.full((7,), 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_leaf_that_is_not_finite_is_refused(bad: float) -> None:
    total = ExactSum(SHAPES, torch.float32, torch.device("cpu"))
    with pytest.raises(FloatingPointError, match="gradient b"):
        total.add("b", torch.tensor([0.0, bad, 0, 0, 0, 0, 0]))


def test_a_sum_that_could_overflow_is_refused() -> None:
    total = ExactSum(SHAPES, torch.float32, torch.device("cpu"))
    total.add("b", torch.full((7,), 1e4))
    total.merge(total.bounds().unsqueeze(0), {})
    total.add("b", torch.full((7,), -1e4))
    with pytest.raises(OverflowError, match="gradient b = 20000"):
        total.merge(total.bounds().unsqueeze(0), {})
