"""The keyed permutation is one for every size and key, looks drawn at random, and never changes between versions."""

import numpy as np
import pytest

from data.permute import Permutation, derive_key


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 997, 4096, 4097])
def test_every_index_is_hit_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        moved = Permutation(size=size, key=key)(np.arange(size))
        assert sorted(moved.tolist()) == list(range(size))


def test_one_index_at_a_time_gives_the_same_as_all_at_once() -> None:
    permutation = Permutation(size=1000, key=5)
    together = permutation(np.arange(1000))
    assert [int(permutation(np.array([i]))[0]) for i in range(1000)] == together.tolist()


def test_far_positions_of_a_huge_range_are_different_and_inside() -> None:
    size = 32_000_000_000_000 // 4096
    index = np.concatenate([np.arange(5000), np.arange(size - 5000, size)])
    moved = Permutation(size=size, key=3)(index)
    assert len(set(moved.tolist())) == len(index)
    assert moved.min() >= 0
    assert moved.max() < size


@pytest.mark.parametrize("size", [2, 3, 5, 8, 40])
def test_every_place_is_equally_likely_over_keys(size: int) -> None:
    keys = 1200
    counts = np.zeros((size, size))
    for number in range(keys):
        counts[np.arange(size), Permutation(size=size, key=derive_key(number))(np.arange(size))] += 1
    expected = keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum(1)
    # mean of chi-square is size - 1, its deviation sqrt(2 (size - 1)); six deviations for the largest of `size` rows
    assert chi_square.max() < size - 1 + 6 * np.sqrt(2 * (size - 1))


def test_neighbours_part() -> None:
    size, keys = 50, 1200
    following = 0
    for number in range(keys):
        moved = Permutation(size=size, key=derive_key(number))(np.arange(size))
        following += int((np.diff(moved) == 1).sum())
    # a random permutation has size - 1 chances of 1 / size: 0.98 per key; five deviations of a Poisson count
    expected = keys * (size - 1) / size
    assert abs(following - expected) < 5 * np.sqrt(expected)


def test_the_order_is_frozen() -> None:
    assert Permutation(size=10, key=1)(np.arange(10)).tolist() == [0, 3, 1, 6, 9, 8, 4, 5, 7, 2]
    assert derive_key(1, "rows", "stdlib") == 17236869153942890914


def test_a_key_depends_on_value_type_and_place_of_every_part() -> None:
    keys = [derive_key(*parts) for parts in [(1, "a"), ("1", "a"), ("a", 1), ("ab", "c"), ("a", "bc"), ("abc",), ()]]
    assert len(set(keys)) == len(keys)
