"""Proves that benchmarks.pipeline runs from end to end, and finds the orders and the traffic that are planned."""

import pytest

from benchmarks.pipeline import LAYOUTS
from tests.benchmarks.programs import run, tables


@pytest.mark.slow
def test_runs_and_finds_the_order_and_the_traffic_of_the_plan() -> None:
    done = run("pipeline", "--rounds", "1", "--steps", "2", "--rows", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    costs, bubbles = tables(done.stdout)
    assert [row["layout"] for row in costs] == [*LAYOUTS]
    assert {row["layout"]: row["order"] for row in bubbles} == {"pipe 2, 1f1b": "kept", "pipe 2, dualpipev": "kept"}
    assert [row["MB sent"] for row in costs] == [row["planned"] for row in costs]
    assert {row["layout"] for row in costs if float(row["MB sent"])} == {row["layout"] for row in bubbles}
