"""Proves that `keel train` with a layout starts real ranks, as torchrun does, which stop, fail and go on as one.

What the supervisor does by itself is in tests/launch/test_local.py.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.dist import sessions
from tests.dist.sessions import ONE
from tests.launch.supervised import children_of
from tests.runs import tiny
from trainer.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240
ENDS_WITHIN_S = 60
"""Far less than the patience of a rank with one that does not come (trainer/parallel/world.py)."""
KEEL = [sys.executable, "-m", "launch.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
WITH_A_BUG = """
import os, sys
from trainer import row
learn, rows = row.learn, []
def learn_wrongly(*arguments):
    rows.append(1)
    if (os.environ["RANK"], len(rows)) == ("1", 2):
        raise RuntimeError("a bug in the second row")
    return learn(*arguments)
row.learn = learn_wrongly
from launch.main import main
sys.exit(main())
"""
OF_RANKS = "import sys; from launch.local import run; sys.exit(run([sys.executable, '-c', *sys.argv[1:]], 2))"
BUG_NAMED = r"keel: rank 1 \(data 1, expert 1\) ended with 1 in step 7, row 2 of 3, passes: RuntimeError: a bug in the "
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a command in the checkout; temporary files go to the test's folder."""

    def popen(command: Sequence[str]) -> "subprocess.Popen[str]":
        (tmp_path / "temporary").mkdir(exist_ok=True)
        own = {"KEEL_PYTHON": sys.executable, "TMPDIR": str(tmp_path / "temporary")}
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture
def words(corpus: Path, tmp_path: Path) -> list[str]:
    """The tiny run on two ranks, which share out rows and experts."""
    return ["train", "parallel=cpu2", *tiny.words(sessions.config(corpus, tmp_path / "runs", ONE))]


def test_two_ranks_stop_and_one_process_goes_on(
    start: Start, words: list[str], run_alone: RunFolder, tmp_path: Path
) -> None:
    process = start([*KEEL, *words])
    wait_for_rows(process, tmp_path / "runs", 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_S)
    run = tiny.only_run(tmp_path / "runs")
    assert (process.returncode, err) == (143, "")
    assert out.count("on cpu, fp32, 2 processes (data 2, expert 2)\n") == 1
    assert out.endswith(f"saved. To go on: ./keel resume {run.path}\n")
    assert list((tmp_path / "temporary").iterdir()) == []

    resumed = start([*KEEL, "resume", str(run.path), "parallel=single"])
    out, err = resumed.communicate(timeout=PATIENCE_S)
    assert (resumed.returncode, err) == (0, "")
    tiny.assert_same_run(run, run_alone)


@pytest.mark.slow
@pytest.mark.parametrize("starter", [KEEL, [*TORCHRUN, "./keel"]], ids=["keel", "torchrun"])
def test_two_ranks_train_to_the_end(
    starter: list[str], start: Start, words: list[str], run_alone: RunFolder, tmp_path: Path
) -> None:
    process = start([*starter, *words])
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert out.count("step 9/9") == 1
    tiny.assert_same_run(tiny.only_run(tmp_path / "runs"), run_alone)


@pytest.mark.slow
def test_the_rank_with_the_bug_is_named(start: Start, words: list[str]) -> None:
    process = start([sys.executable, "-c", OF_RANKS, WITH_A_BUG, *words])
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert re.match(BUG_NAMED, err), err
    named = err
    assert "RuntimeError: a bug in the second row\n" in named


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_a_killed_rank_is_named_and_the_run_goes_on(
    start: Start, words: list[str], run_alone: RunFolder, tmp_path: Path
) -> None:
    process = start([*KEEL, *words])
    wait_for_rows(process, tmp_path / "runs", 3)
    _, second = children_of(process.pid)
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=ENDS_WITHIN_S)
    assert process.returncode == 137
    assert err.startswith("keel: rank 1 (data 1, expert 1) ended with 137 (SIGKILL) in step "), err
    run = tiny.only_run(tmp_path / "runs")
    resumed = start([*KEEL, "resume", str(run.path)])
    _, err = resumed.communicate(timeout=PATIENCE_S)
    assert (resumed.returncode, err) == (0, "")
    tiny.assert_same_run(run, run_alone)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["data.sources.text.path=/nowhere", "+optim.rate_scale.indexr=2"])
def test_a_mistake_that_only_ranks_can_see_is_said_once(
    mistake: str, start: Start, words: list[str], tmp_path: Path
) -> None:
    process = start([*KEEL, *words, mistake])
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert err.startswith("keel: error: ")
    assert err.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*")), "something was created"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_signal_at_any_instant_of_the_start_ends_all(seed: int, start: Start, words: list[str]) -> None:
    """Also while one rank waits for another that has ended already."""
    draw = random.Random(seed)
    number = draw.choice((signal.SIGINT, signal.SIGTERM))
    process = start([*KEEL, *words])
    time.sleep(draw.uniform(1, 6))
    process.send_signal(number)
    _, err = process.communicate(timeout=ENDS_WITHIN_S)
    assert process.returncode in (128 + number, -number, 0), err
    assert "keel: rank" not in err, "what follows from stopping is no failure"


def wait_for_rows(process: "subprocess.Popen[str]", runs_dir: Path, rows: int) -> None:
    """Return once the run has told of so many steps."""
    deadline = time.monotonic() + PATIENCE_S
    while sessions.rows_told(runs_dir) < rows:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)
