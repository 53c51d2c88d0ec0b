"""The blend gives every source its exact share at any prefix, and any row can be found without counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mixture import LARGEST_PERIOD, Blend

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(weights=WEIGHTS)
def test_rows_of_a_source_are_numbered_without_a_gap(weights: list[int]) -> None:
    rows = 3 * sum(weights) + 1
    source, index = Blend(weights).locate(np.arange(rows))
    for number in range(len(weights)):
        assert index[source == number].tolist() == list(range((source == number).sum()))


@given(weights=WEIGHTS)
def test_no_prefix_is_a_row_away_from_its_share(weights: list[int]) -> None:
    rows = 2 * sum(weights)
    source, _ = Blend(weights).locate(np.arange(rows))
    given_rows = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    share = np.arange(1, rows + 1)[:, None] * np.array(weights) / sum(weights)
    # measured: at most 1.0 over 3000 random mixtures of up to six sources
    assert np.abs(given_rows - share).max() < 1.5


@given(weights=WEIGHTS, rows=st.integers(0, 400))
def test_counts_are_those_of_the_prefix(weights: list[int], rows: int) -> None:
    blend = Blend(weights)
    source, _ = blend.locate(np.arange(rows))
    assert blend.counts(rows).tolist() == np.bincount(source, minlength=len(weights)).tolist()


def test_a_row_far_out_costs_nothing() -> None:
    blend = Blend([700, 250, 50])
    far = 8_000_000_000_000
    source, index = blend.locate(np.array([far, far + 1]))
    assert index.tolist() == [int(blend.counts(far + i)[source[i]]) for i in range(2)]


def test_a_common_divisor_changes_nothing() -> None:
    rows = np.arange(500)
    assert np.array_equal(Blend([7, 3]).locate(rows), Blend([7_000_000, 3_000_000]).locate(rows))


def test_a_period_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.sources weight = \[65536, 1\]: expected weights whose sum"):
        Blend([LARGEST_PERIOD, 1])
