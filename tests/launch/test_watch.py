"""Proves that a supervisor knows who has hung and who failed first, starts ranks again, and gives up with a reason.

The ranks are programs without torch; their beats are real ones.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import watch
from launch.watch import Watch, first_failure, together
from tests.launch.supervised import PATIENCE_S, ROOT
from trainer import journal
from trainer.heartbeat import Beat
from trainer.parallel.placement import Placement
from trainer.ranks import Rank

LOST = {"follows": True, "error": "DistBackendError: closed", "time": 10.0}
BUG = {"follows": False, "error": "RuntimeError: a bug", "time": 20.0}
RANK = """
import os, sys, time
sys.path[0] = {root!r}
from trainer.heartbeat import Beat
from trainer.parallel.placement import Placement
rank, attempt, folder = int(os.environ["RANK"]), int(os.environ["KEEL_ATTEMPT"]), os.environ["KEEL_RANKS"]
place = Placement(rank=rank, size=2, local_rank=rank, address="", attempt=attempt, folder=folder)
beat = Beat(place, f"data {{rank}}", 1.0)
beat.start()
from pathlib import Path
beat.follow(Path({run!r}))
beat.step(3, 2)
beat.step(4, 2)
with open({noted!r}, "a") as file:
    file.write(f"{{attempt}} {{rank}} {{os.environ['MASTER_PORT']}} {{sys.argv[1:]}}\\n")
if rank == 1 and attempt < {bad}:
    {act}
if {bad} > attempt:
    time.sleep(600)
"""
SUPERVISE = """
import sys
sys.path[0] = {root!r}
from launch import attempts, local
local.SETTLE_S = local.GRACE_S = 0.3
local.command_of = lambda words: [sys.executable, "-S", "-c", {rank!r}, *words]
sys.exit(attempts.start(["train", "--new"], 2, {restarts}))
"""


def beat(rank: int, failed: dict[str, object] | None = None) -> Rank:
    return Rank(rank=rank, size=4, place="", pid=1, time=0.0, count=1, doing="passes", failed=failed)


def test_who_only_lost_another_is_not_the_cause() -> None:
    failed = [(0, 1, 10.0), (1, 1, 21.0), (2, 1, 11.0)]
    assert first_failure(failed, {0: beat(0, LOST), 1: beat(1, BUG), 2: beat(2, LOST)}) == 1
    # A signal is a cause, whatever the others found; of two causes the first counts, of none the first who lost.
    assert first_failure([(0, 1, 10.0), (3, -9, 12.0)], {0: beat(0, LOST), 3: beat(3)}) == 3
    assert first_failure([(1, 1, 30.0), (3, -9, 25.0)], {1: beat(1, BUG)}) == 1
    assert first_failure([(2, 1, 11.0), (0, 1, 12.0)], {0: beat(0, LOST | {"time": 9.0}), 2: beat(2, LOST)}) == 0


def test_all_that_raise_the_same_have_agreed() -> None:
    beats = {rank: beat(rank, BUG) for rank in range(3)}
    assert together([0, 1, 2], 3, beats) == BUG["error"]
    assert together([0, 1], 3, beats) == ""
    assert together([0, 1, 2], 3, beats | {1: beat(1, LOST)}) == ""
    assert together([0], 1, beats) == ""


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_stopped_rank_is_named_and_a_busy_one_is_not(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STOPPED_S", 0.2)
    beats = [Beat(Placement(rank=rank, size=2, local_rank=0, address="", folder=str(tmp_path))) for rank in range(2)]
    for one in beats:
        one.start()
        one.step(3, 2)
    looked, alive = Watch(tmp_path), {0: os.getpid(), 1: sleeper.pid}
    assert looked.hung(alive) == []
    time.sleep(0.4)
    assert looked.hung(alive) == []
    if sys.platform == "linux":
        sleeper.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        assert looked.hung(alive) == []
        time.sleep(0.4)
        assert looked.hung(alive)[0].startswith("rank 1 in step 3: no sign of life for ")
    for one in beats:
        one.close()


def test_a_hang_is_where_no_rank_comes_on(tmp_path: Path) -> None:
    places = [Placement(rank=rank, size=2, local_rank=0, address="", folder=str(tmp_path)) for rank in range(2)]
    beats = [Beat(place, patience_s=0.6) for place in places]
    for one in beats:
        one.start()
        one.step(3, 2)
        one.row("passes", 0)
        one.row("passes", 1)
    looked, alive = Watch(tmp_path), {0: os.getpid(), 1: os.getpid()}
    for _ in range(4):
        time.sleep(0.3)
        beats[0].row("passes", 1)
        assert looked.hung(alive) == []
    time.sleep(0.9)
    assert "has been there for" in looked.hung(alive)[0]
    for one in beats:
        one.close()


def start(folder: Path, act: str, bad: int, restarts: int) -> tuple[int, list[str], list[str]]:
    """Exit code, lines on stderr, and what the ranks noted: attempt, rank, port, words."""
    (folder / "run" / "logs").mkdir(parents=True)
    (folder / "run" / "history.jsonl").touch()
    rank = RANK.format(root=str(ROOT), run=str(folder / "run"), noted=str(folder / "noted"), bad=bad, act=act)
    code = SUPERVISE.format(root=str(ROOT), rank=rank, restarts=restarts)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    return ended.returncode, ended.stderr.splitlines(), sorted((folder / "noted").read_text().splitlines())


KILL = "os.kill(os.getpid(), 9)"


def test_failed_ranks_are_started_again_elsewhere_and_the_history_says_so(tmp_path: Path) -> None:
    code, said, noted = start(tmp_path, KILL, bad=1, restarts=2)
    assert code == 0
    logs = tmp_path / "run" / "logs" / "ranks-1"
    assert said == [
        "keel: rank 1 (data 1) ended with 137 (SIGKILL) in step 4",
        f"keel: what the ranks wrote is in {logs}",
        "keel: restart 1 of 2, from the last checkpoint",
    ]
    assert (logs / "rank-1.stderr").exists()
    assert [line.split()[:2] for line in noted] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert len({line.split()[2] for line in noted}) == 2, "a late process could join"
    assert [line.partition("[")[2] for line in noted] == ["'train', '--new']"] * 2 + ["'train']"] * 2
    end, row = journal.read(tmp_path / "run" / "history.jsonl")
    assert (end["event"], end["step"]) == ("end", 3)
    assert (row["event"], row["step"], row["attempt"]) == ("restart", 3, 1)
    assert end["reason"] == row["reason"] == "rank 1 (data 1) ended with 137 (SIGKILL) in step 4"


def test_the_same_step_twice_is_enough(tmp_path: Path) -> None:
    code, said, noted = start(tmp_path, KILL, bad=9, restarts=5)
    assert (code, len(noted)) == (137, 4)
    assert said[-1] == "keel: no restart: step 4 has failed again, without a step done in between"


def test_restarts_are_used_up(tmp_path: Path) -> None:
    """Every attempt comes a step further."""
    code, said, _ = start(tmp_path, "beat.step(4 + attempt, 2); " + KILL, bad=9, restarts=2)
    assert code == 137
    assert said[-1] == "keel: no restart: restarts = 2 are used up"


def test_a_hang_ends_the_job_and_is_started_again(tmp_path: Path) -> None:
    code, said, _ = start(tmp_path, "time.sleep(600)", bad=1, restarts=1)
    assert code == 0
    assert said[0].startswith("keel: the run hangs: rank 0 (data 0) in step 4: has been there for ")
    assert said[1].startswith("      rank 1 (data 1) in step 4")


def test_a_rank_that_failed_and_cannot_end_is_the_cause(tmp_path: Path) -> None:
    """Its threads may still wait for the others."""
    code, said, _ = start(tmp_path, "beat.fail(RuntimeError('a bug')); time.sleep(600)", bad=9, restarts=0)
    assert code == 1
    assert said[0] == "keel: rank 1 (data 1) ended with 1 in step 4: RuntimeError: a bug"


def test_without_a_failure_nothing_is_said(tmp_path: Path) -> None:
    assert start(tmp_path, KILL, bad=0, restarts=1)[:2] == (0, [])
    assert journal.read(tmp_path / "run" / "history.jsonl") == []
