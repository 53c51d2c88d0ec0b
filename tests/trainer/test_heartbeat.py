"""Proves what a rank tells of itself: where it is, what it waits for, its own work, why it fails; who is missing."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from trainer import heartbeat, ranks
from trainer.crew import Lost
from trainer.heartbeat import Beat, is_loss
from trainer.parallel.mesh import Mesh
from trainer.parallel.placement import Placement
from trainer.ranks import Rank

RANK = Rank(rank=0, size=4, place="", pid=1, time=0.0, count=1, doing="passes", step=3, rows=4, seen_s=60.0)
WAITS = {"call": "all_reduce", "ranks": [0, 1, 2, 3]}


def beat_in(folder: Path, rank: int = 1, size: int = 2, patience_s: float = 0.0) -> Beat:
    place = Placement(rank=rank, size=size, local_rank=rank, address="", folder=str(folder))
    made = Beat(place, f"data {rank}", patience_s)
    made.start()
    return made


def test_a_mark_is_told_at_once_and_survives_the_process(tmp_path: Path) -> None:
    beat = beat_in(tmp_path)
    beat.step(7, 3)
    beat.row("passes", 1)
    (one,) = ranks.read(tmp_path)
    assert (one.name, one.where, one.pid) == ("rank 1 (data 1)", "step 7, row 2 of 3, passes", os.getpid())
    beat.close()


def test_a_long_computation_goes_on_beating_and_grows_old(tmp_path: Path) -> None:
    beat = beat_in(tmp_path, rank=0, size=1)
    beat.mark("update")
    time.sleep(0.5)
    (first,) = ranks.read(tmp_path)
    time.sleep(0.5)
    (second,) = ranks.read(tmp_path)
    assert first.count < second.count
    assert 0.2 < first.age_s < second.age_s
    beat.mark("update")
    assert ranks.read(tmp_path)[0].age_s == 0
    beat.close()


def test_the_run_s_folder_is_told_of_too_and_the_supervisor_of_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "watch").mkdir()
    beat = beat_in(tmp_path / "watch", rank=0, size=1)
    beat.follow(tmp_path / "run")
    assert (tmp_path / "watch" / "run").read_text() == str(tmp_path / "run")
    assert [one.rank for one in ranks.read(tmp_path / "run" / "ranks")] == [0]
    beat.close()


@pytest.mark.parametrize(
    ("patience_s", "doing", "limits_s"),
    [(0.0, "passes", [600, 600]), (3.0, "passes", [60, 3]), (90.0, "passes", [90, 90]), (3.0, "reading", [600, 600])],
)
def test_limits_before_much_is_known(tmp_path: Path, patience_s: float, doing: str, limits_s: list[float]) -> None:
    beat = beat_in(tmp_path, rank=0, size=1, patience_s=patience_s)
    found = []
    for _ in limits_s:
        beat.mark(doing)
        found.append(ranks.read(tmp_path)[0].limit_s)
    assert found == limits_s
    beat.close()


def test_a_limit_is_learned_from_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LEAST_S", 0.5)
    beat = beat_in(tmp_path, rank=0, size=1)
    for seconds in (0.0, 0.4, 0.0, 0.0):
        beat.mark("passes")
        time.sleep(seconds)
    (told,) = ranks.read(tmp_path)
    assert 2 < told.limit_s < 10
    beat.close()


def test_waiting_is_seen_and_is_no_work(tmp_path: Path) -> None:
    """The call is found in the main thread's stack, whoever makes it: here in code that says it is torch's."""
    source = "def all_reduce(x, op=None, group=None): time.sleep(1)"
    place: dict[str, Any] = {"time": time}
    exec(compile(source, "/torch/distributed/distributed_c10d.py", "exec"), place)
    beat = beat_in(tmp_path, rank=0, size=1)
    beat.step(1, 1)
    seen: list[Rank] = []
    threading.Timer(0.5, lambda: seen.extend(ranks.read(tmp_path))).start()
    place["all_reduce"](None)
    beat.step(2, 1)
    assert seen[0].exchange == {"call": "all_reduce", "ranks": [0]}
    assert seen[0].at.startswith("trainer/test_heartbeat.py:")
    worked = ranks.read(tmp_path)[0].own_s
    assert worked is not None
    assert worked < 0.35
    beat.close()


def raised(act: object) -> BaseException:
    try:
        act()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_whether_another_was_lost_or_the_error_is_its_own() -> None:
    assert is_loss(raised(lambda: dist.all_reduce(None)))
    assert not is_loss(raised(lambda: 1 / 0))
    outer = RuntimeError("a wrapper")
    outer.__cause__ = raised(lambda: dist.all_reduce(None))
    assert is_loss(outer)
    assert is_loss(Lost("a rank does not answer"))


def waiting(*numbers: int) -> list[Rank]:
    """Four ranks, of which these wait."""
    return [replace(RANK, rank=rank, exchange=WAITS if rank in numbers else None) for rank in range(4)]


def first(lines: list[str]) -> list[str]:
    return [line.split(" in ")[0] for line in lines]


def test_who_is_missing() -> None:
    found = ranks.suspects(waiting(0, 1, 3), {})
    assert first(found) == ["rank 2", "ranks 0, 1, 3 wait"]
    # Who does not beat, though it seemed to wait, before who works.
    assert first(ranks.suspects(waiting(0, 1, 3), {1: 60.0}))[0] == "rank 1"
    failed = [replace(one, failed={"follows": one.rank != 3, "error": "E: why", "time": 0.0}) for one in waiting(0, 1)]
    assert first(ranks.suspects(failed, {1: 60.0})) == ["rank 3", "ranks 0, 1 wait"]
    assert len(ranks.suspects(waiting(0, 1, 2, 3), {})) == 4


def test_who_is_slow() -> None:
    def told(*work: float, places: tuple[str, ...] = ("",) * 4) -> list[int]:
        each = zip(work, places, strict=True)
        return [
            one.rank
            for one, _ in ranks.stragglers(
                [replace(RANK, rank=rank, own_s=own, place=place) for rank, (own, place) in enumerate(each)]
            )
        ]

    assert told(1.0, 1.1, 1.4, 1.0) == []
    assert told(1.0, 1.1, 1.7, 1.0) == [2]
    assert told(1.0, 1.0, 2.0, 2.0, places=("pipe 0", "pipe 0", "pipe 1", "pipe 1")) == []
    assert ranks.stragglers([replace(RANK, own_s=9.0, seen_s=1.0), replace(RANK, rank=1, own_s=1.0)]) == []


def test_coordinates_and_the_ranks_of_a_row() -> None:
    mesh = Mesh(pipe=2, data=2, expert=2)
    assert ranks.coordinates(mesh, 3) == "pipe 1, data 1, expert 1"
    assert ranks.coordinates(Mesh(), 0) == ""
    beats = [replace(RANK, rank=rank, place=ranks.coordinates(mesh, rank)) for rank in range(4)]
    assert [one.rank for one in ranks.of_row(beats, 4)] == [1, 3]
