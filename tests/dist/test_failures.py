"""Proves that a whole run that fails in any way ends soon, names the rank at fault, and goes on where it is asked to.

The faults are those of benchmarks.faults; the full campaign is `python -m benchmarks.failures`.
"""

import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import failures
from benchmarks.faults import FAULTS
from tests.dist import sessions
from tests.runs import tiny
from trainer import folder, journal, ranks
from trainer.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 90
"""From the fault to the line that names it; who stands still is given 5 s, in a phase that is new a minute."""
BUG_UNDER_TORCHRUN = """
import os, sys, time
from trainer import row
learn, rows = row.learn, []
def learn_late(*arguments):
    rows.append(1)
    if os.environ["RANK"] == "1" and len(rows) == 2:
        time.sleep(600)
    return learn(*arguments)
row.learn = learn_late
from datetime import timedelta
from trainer import joined
joined.PATIENCE = timedelta(seconds=4)
from launch.main import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", failures.LAYOUTS[:3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_soon(fault: str, layout: str, corpus: Path, tmp_path: Path) -> None:
    one = failures.take(corpus, tmp_path / "try", layout, fault, random.Random(f"{fault} {layout}"))
    assert not one.hung, one.said
    assert one.whole or not one.restarts, one.said
    if one.seconds is not None:
        assert one.named, one.said
        assert one.seconds < WITHIN_S


@pytest.mark.slow
def test_a_run_that_was_started_again_is_the_run(corpus: Path, run_alone: RunFolder, tmp_path: Path) -> None:
    """Killed in its sixth step, it goes on from the fourth to the same bits, and its history tells of both."""
    plan = {"fault": "kill", "rank": 1, "step": 6, "row": 0}
    words = tiny.words(sessions.config(corpus, tmp_path / "runs", sessions.ONE))
    code, said, _ = failures.run(plan, [*words, "parallel=cpu2", "restarts=1"], tmp_path)
    assert code == 0, said
    run = tiny.only_run(tmp_path / "runs")
    tiny.assert_same_run(run, run_alone)
    events = [row["event"] for row in run.history()]
    assert events == ["start", "end", "restart", "resume", "end"]
    assert journal.read(run.path / "history.jsonl")[1]["reason"].startswith("rank 1 (data 1, expert 1) ended with 137")


@pytest.mark.slow
def test_who_is_missing_is_said_without_a_supervisor_too(corpus: Path, tmp_path: Path) -> None:
    words = tiny.words(sessions.config(corpus, tmp_path / "runs", sessions.ONE))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-c", BUG_UNDER_TORCHRUN, "train", "parallel.data=2", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode != 0
    assert "keel: rank 0 has lost the others; rank 1 (data 1) in step " in ended.stderr, ended.stderr
    assert "has been there for" in ended.stderr


def test_identity_is_the_same_however_failures_are_met(corpus: Path, tmp_path: Path) -> None:
    plain = asdict(sessions.config(corpus, tmp_path, sessions.ONE))
    met = asdict(sessions.config(corpus, tmp_path, sessions.ONE, restarts=3, patience_s=7.0))
    assert folder.identity(plain) == folder.identity(met)
    assert folder.identity(plain) != folder.identity(plain | {"seed": 5})


def test_a_run_leaves_the_beats_of_its_ranks(run_alone: RunFolder) -> None:
    (one,) = ranks.read(run_alone.path / "ranks")
    assert (one.rank, one.size, one.step, one.doing, one.pid) == (0, 1, tiny.STEPS, "ending", os.getpid())
