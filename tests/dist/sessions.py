"""Whole runs on many ranks: one command in every process, as a supervisor starts and ends them, on any layout."""

import contextlib
import os
import random
import signal
import sys
import time
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from tests.dist import ranks
from tests.dist.ranks import Plant
from tests.runs import children, tiny
from trainer.config import CheckpointConfig, ParallelConfig, TrainConfig
from trainer.parallel.mesh import Mesh
from trainer.run import train

ONE = Mesh()
LAYOUTS = (
    ONE,
    Mesh(data=2, owners=2),
    Mesh(data=2, expert=2),
    Mesh(data=3, owners=3),
    Mesh(data=4, expert=2, owners=2),
    Mesh(data=4, expert=4, owners=4),
    Mesh(pipe=2),
    Mesh(pipe=2, data=2, expert=2, owners=2),
)
"""One process, data ranks, expert ranks, both, stages; owners as many as data ranks or fewer."""
EVER = sys.maxsize
WATCH_S = 0.002


def config(corpus: Path, runs_dir: Path, mesh: Mesh, **changes: Any) -> TrainConfig:
    """The tiny run on a layout, saved every second step."""
    parallel = ParallelConfig(pipe=mesh.pipe, data=mesh.data, expert=mesh.expert, owners_limit=mesh.owners)
    values = {"model": ranks.MODEL, "checkpoint": CheckpointConfig(every_steps=2, keep_last=2), "parallel": parallel}
    return tiny.config(corpus, runs_dir, **(values | changes))


def name(mesh: Mesh) -> str:
    """A layout in the name of a test."""
    stages = f"pipe{mesh.pipe}-" if mesh.pipe > 1 else ""
    return f"{stages}data{mesh.data}-expert{mesh.expert}-owners{mesh.owners}"


class Session:
    """The processes of one start of a run. plant: called in each of them first; breaks something there."""

    def __init__(
        self, processes: BaseContext, config: TrainConfig, stop_at: int = EVER, plant: Plant | None = None
    ) -> None:
        self.runs_dir, self.size = Path(config.runs_dir), config.parallel.mesh.size
        self._folder = self.runs_dir.with_name(f"{self.runs_dir.name}-ranks")
        self._children = ranks.begin(processes, train_there, self.size, self._folder, config, stop_at, plant)

    def is_over(self) -> bool:
        """True once no process runs."""
        return not any(child.is_alive() for child in self._children)

    def wait(self) -> list[int | None]:
        """The exit codes, once all have ended by themselves."""
        deadline = time.monotonic() + ranks.PATIENCE_S
        for child in self._children:
            child.join(max(0.0, deadline - time.monotonic()))
        assert self.is_over(), f"not all ranks have ended in {ranks.PATIENCE_S} s\n{self.said()}"
        return self.end()

    def wait_for_rows(self, rows: int) -> None:
        """Return once the run has told of `rows` steps, or a process has ended."""
        deadline = time.monotonic() + ranks.PATIENCE_S
        while all(child.is_alive() for child in self._children) and rows_told(self.runs_dir) < rows:
            assert time.monotonic() < deadline, f"no progress\n{self.said()}"
            time.sleep(WATCH_S)

    def wait_for(self, seconds: float) -> None:
        """Return after so long, or once all processes have ended."""
        deadline = time.monotonic() + seconds
        for child in self._children:
            child.join(max(0.0, deadline - time.monotonic()))

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send one of the processes a signal; its exit code tells whether it still lived."""
        child = self._children[rank]
        assert child.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)

    def end(self) -> list[int | None]:
        """The exit codes; what still runs is killed, as a supervisor does."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.join()
        return [child.exitcode for child in self._children]

    def said(self) -> str:
        """All that the ranks have written."""
        files = sorted([*self._folder.glob("*.log"), *self._folder.glob("*.failed")])
        return "\n".join(f"-- {file.name}\n{file.read_text()}" for file in files)


def train_there(rank: int, folder: Path, config: TrainConfig, stop_at: int, plant: Plant | None) -> None:
    """Train as the command does; the process ends with the run's exit code."""
    log = folder / f"{rank}.log"
    if plant is not None:
        plant(pytest.MonkeyPatch())
    children.begin(log, log)
    sys.exit(train(config, place=ranks.placement(rank, config.parallel.mesh.size, folder), stop_at=stop_at))


def rows_told(runs_dir: Path) -> int:
    """Whole rows of metrics of the only run, 0 before there is one."""
    files = list(runs_dir.glob("[!.]*/metrics.jsonl"))
    return files[0].read_bytes().count(b"\n") if files else 0


def is_finished(runs_dir: Path) -> bool:
    """Whether the only run has come to its end."""
    return bool(list(runs_dir.glob("[!.]*"))) and tiny.only_run(runs_dir).is_finished()


def kill_until_finished(processes: BaseContext, corpus: Path, runs_dir: Path, draw: random.Random) -> int:
    """Start the run on random layouts and kill a random rank at random instants until the run is done; the kills.

    One of three instants is drawn from the first half second, the others from the time after one of the next few
    steps. The other ranks go on for a while, or end by themselves, until the supervisor kills them too.
    """
    kills = 0
    while not is_finished(runs_dir):
        session = Session(processes, config(corpus, runs_dir, draw.choice(LAYOUTS)))
        if draw.random() < 1 / 3:
            session.wait_for(draw.uniform(0, 0.5))
        else:
            session.wait_for_rows(rows_told(runs_dir) + draw.randint(1, 3))
            session.wait_for(draw.uniform(0, 0.3))
        victim = draw.randrange(session.size)
        session.signal(victim, signal.SIGKILL)
        session.wait_for(draw.choice((0.0, 0.1, 1.0)))
        codes = session.end()
        if codes[victim] == -signal.SIGKILL:
            kills += 1
        elif not is_finished(runs_dir):
            raise AssertionError(f"rank {victim} ended with {codes[victim]}\n{session.said()}")
    return kills
