"""Proves that benchmarks.pipeline runs from end to end, and finds the orders, traffic and memory that are planned."""

import pytest

from benchmarks.pipeline import LAYOUTS
from tests.benchmarks.programs import run, tables


@pytest.mark.slow
def test_runs_and_finds_what_is_planned() -> None:
    """Memory to within 2 %, as tests/dist/test_plan_total.py has it."""
    done = run("pipeline", "--rounds", "1", "--steps", "2", "--rows", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    costs, bubbles, memory = tables(done.stdout)
    assert [row["layout"] for row in costs] == [*LAYOUTS]
    assert {row["layout"]: row["order"] for row in bubbles} == {"pipe 2, 1f1b": "kept", "pipe 2, dualpipev": "kept"}
    assert [row["MB sent"] for row in costs] == [row["planned"] for row in costs]
    assert {row["layout"] for row in costs if float(row["MB sent"])} == {row["layout"] for row in bubbles}
    assert len(memory) == 7, "all ranks of layouts with one thread"
    for row in memory:
        assert float(row["held"]) == pytest.approx(float(row["planned held"]), rel=0.02)
        assert float(row["most"]) == pytest.approx(float(row["planned most"]), rel=0.02)


def test_fewer_rows_than_dualpipev_takes_are_refused() -> None:
    done = run("pipeline", "--rows", "4", "3")
    assert done.returncode == 2
    assert done.stderr.endswith("error: --rows = 3: expected at least 4, so that DualPipeV has enough\n")
