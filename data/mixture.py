"""The blend of sources: row number -> (source, row number within that source), in constant time and exact shares."""

import math
from collections.abc import Sequence

import numpy as np

LARGEST_PERIOD = 65536
"""Rows of one period: its pattern is held in memory and built when the run starts."""


class Blend:
    """Sources in fixed integer shares: each period of sum(weights) rows holds weight[j] rows of source j.

    Within a period the next row goes to the source that lags most behind its share, the first of equals.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """Build the pattern of one period.

        Raises ValueError when the weights, divided by their common divisor, add up to more than LARGEST_PERIOD.
        """
        divisor = math.gcd(*weights)
        self._weights = np.array([weight // divisor for weight in weights], np.int64)
        self._period = int(self._weights.sum())
        if self._period > LARGEST_PERIOD:
            expected = f"weights whose sum, divided by their common divisor, is at most {LARGEST_PERIOD}"
            raise ValueError(f"data.sources weight = {list(weights)}: expected {expected}")
        self._source = _pattern(self._weights)
        self._rank = np.zeros(self._period, np.int64)
        for source in range(len(weights)):
            places = np.flatnonzero(self._source == source)
            self._rank[places] = np.arange(len(places))

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for int64 row numbers the source and the row number within it, both int64 of the same shape."""
        periods, place = np.divmod(rows, self._period)
        source = self._source[place]
        return source, periods * self._weights[source] + self._rank[place]

    def counts(self, rows: int) -> np.ndarray:
        """Return how many of the first `rows` rows each source has: int64 [sources]."""
        periods, rest = divmod(rows, self._period)
        return periods * self._weights + np.bincount(self._source[:rest], minlength=len(self._weights))


def _pattern(weights: np.ndarray) -> np.ndarray:
    period = int(weights.sum())
    given = np.zeros_like(weights)
    pattern = np.empty(period, np.int64)
    for row in range(period):
        source = int(np.argmax(weights * (row + 1) - given * period))
        given[source] += 1
        pattern[row] = source
    return pattern
