"""Proves that status says who has no sign of life, who is slow and what was started again, and is silent otherwise."""

from dataclasses import replace

import pytest

from tests.trainer.report import made_up
from trainer.ranks import Rank
from trainer.report.crew import together
from trainer.report.read import Run

NOW = made_up.NOW.timestamp()
RESTART = {"event": "restart", "step": 12, "attempt": 1, "reason": "rank 1 ended with 137 (SIGKILL) in step 13"}


def beat(rank: int, own_s: float = 1.0, ago_s: float = 0.5, age_s: float = 1.0, waits: bool = True) -> Rank:
    exchange = {"call": "all_reduce", "ranks": [0, 1, 2]} if waits else None
    return Rank(
        rank=rank, size=3, place=f"data {rank}", pid=1, time=NOW - ago_s, count=9, doing="passes", step=13, rows=8,
        row=2, age_s=age_s, limit_s=60.0, seen_s=30.0, own_s=own_s, exchange=exchange,
    )  # fmt: skip


def going(*beats: Rank, state: str = "running") -> Run:
    return replace(made_up.run(), state=state, now=made_up.NOW, beats=beats, history=[])


def said(run: Run) -> list[tuple[str, str]]:
    verdict = together(run)
    return [] if verdict is None else [(reason.level, reason.text) for reason in verdict.reasons]


def test_ranks_that_come_on_are_good() -> None:
    assert said(going(beat(0), beat(1), beat(2))) == [("good", "3 ranks, all of them beat")]


def test_one_process_or_a_run_that_is_over_has_nothing_to_say() -> None:
    assert together(going(beat(0))) is None
    assert together(going(beat(0), beat(1, ago_s=900.0), state="finished")) is None


def test_who_does_not_beat_is_named_and_who_waits() -> None:
    assert said(going(beat(0), beat(1, ago_s=40.0), beat(2))) == [
        ("bad", "rank 1 (data 1) in step 13, row 2 of 8, passes: no sign of life for 40 s"),
        ("bad", "ranks 0, 2 wait in all_reduce"),
    ]


def test_all_beyond_their_limit_have_hung_and_the_busy_one_is_named() -> None:
    ranks = [beat(0, age_s=90.0), beat(1, age_s=90.0), beat(2, age_s=80.0, waits=False)]
    assert said(going(*ranks))[0] == (
        "bad",
        "rank 2 (data 2) in step 13, row 2 of 8, passes: has been there for 80 s",
    )
    assert said(going(*ranks[:2], beat(2, waits=False)))[0][0] == "good", "one of them comes on"


def test_a_straggler_is_worth_a_look() -> None:
    assert said(going(beat(0), beat(1, own_s=1.8), beat(2))) == [
        ("look", "rank 1 (data 1) is slow: 1.8 times the work of the others in a step")
    ]


@pytest.mark.parametrize("state", ["running", "failed"])
def test_restarts_are_counted(state: str) -> None:
    run = replace(going(beat(0), beat(1), state=state), history=[RESTART, RESTART])
    assert said(run)[0] == ("look", f"started again 2 times, the last time because {RESTART['reason']}")
