"""Proves that a run of many ranks, one of which is killed at any instant, goes on with other ranks to the same bits."""

import random
import signal
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.dist import sessions
from tests.runs import tiny
from trainer.folder import RunFolder


def kill_often(processes: BaseContext, corpus: Path, folder: Path, alone: RunFolder, kills: int, seed: int) -> None:
    """Chains of kills, each chain one run, until there were enough."""
    draw, chain = random.Random(seed), 0
    while kills > 0:
        chain += 1
        runs_dir = folder / f"{chain}"
        try:
            kills -= sessions.kill_until_finished(processes, corpus, runs_dir, draw)
            tiny.assert_same_run(tiny.only_run(runs_dir), alone)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, run {chain}: {error}") from error


def test_killed_three_times(processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path) -> None:
    kill_often(processes, corpus, tmp_path, run_alone, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_twenty_times(
    seed: int, processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    kill_often(processes, corpus, tmp_path, run_alone, kills=20, seed=seed)


@pytest.mark.parametrize("victim", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_the_other_ranks_end_by_themselves(victim: int, processes: BaseContext, corpus: Path, tmp_path: Path) -> None:
    """They lose a rank they speak with: an error, not ten minutes of patience."""
    session = sessions.Session(processes, sessions.config(corpus, tmp_path / "runs", sessions.LAYOUTS[4]))
    session.wait_for_rows(2)
    session.signal(victim, signal.SIGKILL)
    assert session.wait() == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)], session.said()
