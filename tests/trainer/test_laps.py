"""Proves where the seconds of a step go: what passes leave over, and what waits for other ranks, is told apart."""

from dataclasses import asdict, dataclass
from typing import Any, cast

import pytest

from trainer.laps import Laps, seconds_of


@dataclass(frozen=True)
class Given:
    """Laps that are known."""

    laps: tuple[float, ...]

    def seconds(self) -> list[float]:
        return list(self.laps)


def parts(step: tuple[float, ...], rows: list[tuple[float, ...]], threads: int, *, staged: bool) -> dict[str, float]:
    given = cast(list[Any], [Given(row) for row in rows])
    return asdict(seconds_of(cast(Laps, Given(step)), given, threads, staged=staged))


STEP = (1.0, 20.0, 300.0, 4.0, 5.0, 6.0)
"""Waiting for rows, the rows, meeting the other ranks, reduction, update, publishing."""


def test_a_stage_has_its_rows_time_but_for_the_passes() -> None:
    found = parts(STEP, [(2.0, 3.0, 0.5), (2.5, 3.5, 0.25)], 1, staged=True)
    passes = {"forward": 4.5, "backward": 6.5, "reduce": 0.75}
    assert found == {"wait": 1.0, **passes, "pipe": 20.0 - 11.75, "exchange": 10.0, "update": 5.0}
    assert sum(found.values()) == sum(STEP) - 300.0


def test_a_rank_with_all_layers_has_none() -> None:
    found = parts(STEP, [(2.0, 3.0, 0.5), (2.5, 3.5, 0.25)], 2, staged=False)
    assert found == {
        "wait": 1.0, "forward": 2.25, "backward": 3.25, "reduce": 0.375, "pipe": 0.0, "exchange": 10.0, "update": 5.0,
    }  # fmt: skip


@pytest.mark.parametrize("staged", [True, False])
def test_a_rank_without_rows_has_no_passes(staged: bool) -> None:
    assert parts(STEP, [], 1, staged=staged)["pipe"] == (20.0 if staged else 0.0)
