"""Proves that the terminal view says where a run stands, in colours only where asked, and as JSON for machines."""

import json
import math
import re
from datetime import timedelta
from typing import Any

import pytest

from tests.trainer.report import made_up
from trainer.report import terminal


def half(**changes: Any) -> Any:
    """A running run after 40 of 80 steps, five seconds after the last."""
    return made_up.run(
        rows=[made_up.row(step) for step in range(1, 41)],
        told=made_up.history(("start", 0, 0.0)),
        **({"state": "running", "now": made_up.BEGAN + timedelta(seconds=405)} | changes),
    )


def test_a_running_run_tells_what_is_done_and_what_is_left() -> None:
    said = terminal.view(half(), colours=False)
    for words in (
        "made-1234  running  step 40 of 80  164k of 328k tokens",
        "50 %, 6 min 40 s left, ends at 12:13",
        "16 rows of 256 tokens",
        "held out         2.494",
        "learning      ✓ good",
        "on schedule   ✓ good  40 of 80 steps",
    ):
        assert words in said
    assert "\033" not in said


def test_what_is_too_little_for_a_line_stands_beside_its_curve() -> None:
    said = terminal.view(made_up.run(), colours=False)
    for label, beside in (("held out", "nats, 1.570 bits per byte"), ("indexer", "nats, recall 0.80")):
        (line,) = (line for line in said.splitlines() if line.strip().startswith(label))
        assert line.endswith(beside)


def test_colours_change_nothing_but_colours() -> None:
    plain, coloured = (terminal.view(half(), colours=colours) for colours in (False, True))
    assert "\033[32m" in coloured
    assert re.sub(r"\033\[\d+m", "", coloured) == plain


def test_every_reason_to_look_is_shown() -> None:
    rows = [made_up.row(step) | {"mhc/composite_gain": 5.0, "router/dead_experts": 2} for step in range(1, 41)]
    said = terminal.view(made_up.run(rows=rows), colours=False)
    assert "healthy       ! look  " in said
    assert "dead experts 2 of 16" in said
    assert "gain of all residual mixes together 5.00" in said


def test_the_line_for_logs_has_the_same_numbers() -> None:
    said = terminal.line(half())
    assert "\n" not in said
    assert "step 40/80" in said
    assert "left 6 min 40 s" in said
    assert "healthy: good" in said


def test_json_is_strict_and_complete() -> None:
    rows = [made_up.row(step) for step in range(1, 41)]
    rows[-1]["loss/lm"] = "NaN"
    found = terminal.as_dict(made_up.run(rows=rows))
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text)["metrics"]["loss/lm"] is None
    assert found["metrics"]["validation/loss"] == pytest.approx(2 + 3 / math.sqrt(40) + 0.02)
    assert found["verdicts"]["learning"]["level"] == "bad"
    assert found["total_steps"] == 80


def test_a_run_without_a_step_is_told() -> None:
    run = made_up.run(rows=[], told=[], checkpoints=[], state="running")
    assert "step 0 of 80" in terminal.view(run, colours=False)
    assert terminal.as_dict(run)["tokens_per_s"] is None
    assert "step 0/80" in terminal.line(run)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([1.0], "▁"), ([0.0, 7.0], "▁█"), ([3.0, math.nan, 1.0], "█?▁"), ([2.0, 2.0], "▁▁")],
)
def test_sparklines(values: list[float], drawn: str) -> None:
    assert terminal.sparkline(values) == drawn


def test_a_long_sparkline_ends_with_the_newest_value() -> None:
    drawn = terminal.sparkline([1.0] * 999 + [5.0], width=32)
    assert len(drawn) == 32
    assert drawn[-1] == "█"
