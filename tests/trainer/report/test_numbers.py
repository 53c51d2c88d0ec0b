"""Proves that numbers read as people write them, that ticks are round, and that thinned curves keep their outline."""

import math
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (334848, "335k"),
        (999.6, "1.00k"),
        (999_999, "1.00M"),
        (3.3945, "3.39"),
        (0.5, "0.500"),
        (0.00123, "0.00123"),
        (1e-6, "1e-6"),
        (-1.234e-5, "-1.23e-5"),
        (33e12, "33.0T"),
        (math.nan, "NaN"),
        (-math.inf, "-inf"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert numbers.short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.04, "3.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (90_000, "1 d 1 h"),
        (40 * 86400, "40 d"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.031, "3 %"), (0.0004, "0.040 %"), (0.009, "0.90 %"), (1, "100 %")]
)
def test_percent_does_not_call_little_nothing(share: float, text: str) -> None:
    assert numbers.percent(share) == text


def test_size_and_count() -> None:
    assert [numbers.size(n) for n in (12, 2048, 700 * 2**20, 3 * 2**40)] == ["12 B", "2.00 KiB", "700 MiB", "3.00 TiB"]
    assert [numbers.count(n) for n in (0, 9999, 23424)] == ["0", "9999", "23.4k"]


def test_a_moment_is_told_in_the_readers_zone_and_with_the_date_when_it_is_another_day() -> None:
    now = datetime(2026, 3, 1, 23, 0, tzinfo=timezone(timedelta(hours=1)))
    assert numbers.moment(datetime(2026, 3, 1, 17, 20, tzinfo=UTC), now) == "18:20"
    assert numbers.moment(now + timedelta(hours=2), now) == "2 Mar 01:00"
    assert numbers.moment(now + timedelta(days=400), now) == "5 Apr 2027"


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(3, 9))
def test_ticks_are_round_inside_and_few(low: float, width: float, most: int) -> None:
    # Axes of curves: closer than a millionth of its value no metric of ours is looked at.
    width = max(width, 1e-6 * abs(low))
    found = numbers.ticks(low, low + width, most)
    slack = 1e-6 * width
    assert len(found) <= most
    assert all(low - slack <= tick <= low + width + slack for tick in found)
    for before, after in pairwise(found):
        mantissa, _, _ = f"{after - before:.3e}".partition("e")
        assert mantissa in ("1.000", "2.000", "5.000")


def test_ticks_of_an_axis_are_told_apart() -> None:
    assert numbers.tick_texts([2.010, 2.0105, 2.011]) == ["2.01", "2.0105", "2.011"]
    assert numbers.tick_texts([0, 100_000, 200_000]) == ["0", "100k", "200k"]
    assert numbers.log_ticks(1e-7, 3) == pytest.approx([1e-7, 1e-5, 1e-3, 1e-1])
    assert numbers.log_ticks(0.4, 3) == pytest.approx([0.5, 1, 2])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(10, 60))
def test_a_thinned_curve_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = numbers.thin(points, most)
    assert len(kept) <= most + 2
    assert {points[0], points[-1]} <= set(kept)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert max(y for _, y in kept) == max(values)
    assert min(y for _, y in kept) == min(values)


def test_a_thinned_curve_keeps_what_is_not_a_number() -> None:
    points = [(i, math.nan if i == 777 else 1.0) for i in range(5000)]
    assert any(math.isnan(value) for _, value in numbers.thin(points, 100))


def test_the_running_mean_is_that_of_the_points_around() -> None:
    points = [(i, float(i * i)) for i in range(9)] + [(9, math.nan)]
    means = dict(numbers.smooth(points, 5))
    assert means[4] == pytest.approx((4 + 9 + 16 + 25 + 36) / 5)
    assert means[0] == pytest.approx((0 + 1 + 4) / 3)
    assert 9 not in means


def test_between_two_points_a_curve_is_straight() -> None:
    points = [(0, 1.0), (10, 3.0), (20, 3.0), (40, 5.0)]
    assert [numbers.at(points, x) for x in (0, 5, 10, 30, 40)] == [1, 2, 3, 4, 5]
