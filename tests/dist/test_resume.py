"""Proves that a run that stops anywhere and goes on with other ranks ends with the bits of one that nobody touched."""

import random
import signal
from collections.abc import Sequence
from itertools import cycle, islice
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.dist import sessions
from tests.dist.sessions import EVER, ONE, Session
from tests.runs import tiny
from trainer import checkpoint
from trainer.folder import RunFolder
from trainer.parallel.mesh import Mesh

FOUR, TWO, THREE = Mesh(data=4, expert=2, owners=2), Mesh(data=2, expert=2, owners=2), Mesh(data=3, owners=3)
CHAIN = (FOUR, ONE, TWO, THREE)
STAGES = (Mesh(pipe=2, data=2, expert=2, owners=2), TWO, Mesh(pipe=2), ONE)
LONGER = (
    *CHAIN,
    *STAGES[::2],
    Mesh(pipe=2, data=4, expert=2, owners=2),
    Mesh(data=4, expert=4, owners=4),
    Mesh(data=2, owners=1),
    Mesh(data=8, expert=4, owners=4),
)


def go_on(processes: BaseContext, corpus: Path, runs_dir: Path, meshes: Sequence[Mesh], stops: Sequence[int]) -> None:
    """One session on each layout in turn, stopped before the step of its number."""
    for mesh, stop in zip(meshes, stops, strict=True):
        session = Session(processes, sessions.config(corpus, runs_dir, mesh), stop)
        assert session.wait() == [0] * mesh.size, session.said()


def test_four_then_one_then_two_then_three_ranks(
    processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    """One of the stops is at a step that a run saves anyhow, the others are not."""
    go_on(processes, corpus, tmp_path / "runs", CHAIN, [2, 5, 7, EVER])
    run = tiny.only_run(tmp_path / "runs")
    tiny.assert_same_run(run, run_alone)
    assert [row["step"] for row in run.history() if row["event"] == "resume"] == [2, 5, 7]
    changes = [row["changes"] for row in run.history() if row["event"] == "resume"]
    assert "parallel.data was 4, is 1" in changes[0]


def test_stages_then_none_then_stages_again(
    processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    go_on(processes, corpus, tmp_path / "runs", STAGES, [3, 4, 7, EVER])
    tiny.assert_same_run(tiny.only_run(tmp_path / "runs"), run_alone)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(LONGER), 2))
def test_another_layout_after_every_step(
    first: int, processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    """Each chain begins with another layout, so that a step is taken by another in each."""
    meshes = list(islice(cycle(LONGER), first, first + tiny.STEPS))
    go_on(processes, corpus, tmp_path / "runs", meshes, [*range(1, tiny.STEPS), EVER])
    tiny.assert_same_run(tiny.only_run(tmp_path / "runs"), run_alone)


@pytest.mark.slow
@pytest.mark.parametrize("stop", range(tiny.STEPS))
def test_stopped_at_any_step(
    stop: int, processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    go_on(processes, corpus, tmp_path / "runs", [(FOUR, THREE), (ONE, FOUR), (THREE, ONE)][stop % 3], [stop, EVER])
    tiny.assert_same_run(tiny.only_run(tmp_path / "runs"), run_alone)


@pytest.mark.slow
def test_bf16_goes_on_from_masters_that_others_had(processes: BaseContext, corpus: Path, tmp_path: Path) -> None:
    runs = []
    for name, meshes, stops in (("alone", [ONE], [EVER]), ("chain", CHAIN, [2, 5, 7, EVER])):
        for mesh, stop in zip(meshes, stops, strict=True):
            config = tiny.with_dtype(sessions.config(corpus, tmp_path / name, mesh), "bf16")
            session = Session(processes, config, stop)
            assert session.wait() == [0] * mesh.size, session.said()
        runs.append(tiny.only_run(tmp_path / name))
    tiny.assert_same_run(*runs)


# asked to stop


def check_signal(
    processes: BaseContext, corpus: Path, alone: RunFolder, folder: Path, mesh: Mesh, number: signal.Signals, seed: int
) -> None:
    """A signal to one rank, drawn by the seed, stops all: saved, and all with the exit code that says so."""
    draw, config = random.Random(seed), sessions.config(corpus, folder / "runs", mesh)
    session = Session(processes, config)
    session.wait_for_rows(draw.randint(1, 5))
    asked = draw.randrange(mesh.size)
    session.signal(asked, number)
    said = f"seed {seed}, rank {asked}"
    assert session.wait() == [128 + number] * mesh.size, f"{said}\n{session.said()}"
    run = tiny.only_run(session.runs_dir)
    steps = sessions.rows_told(session.runs_dir)
    assert 1 <= steps < tiny.STEPS, said
    assert max(checkpoint.steps(run.checkpoints)) == steps, said
    assert run.history()[-1] | {"time": ""} == {"time": "", "event": "end", "step": steps, "reason": number.name}
    go_on(processes, corpus, session.runs_dir, [draw.choice(sessions.LAYOUTS)], [EVER])
    tiny.assert_same_run(run, alone)


def test_a_signal_to_one_rank_stops_all(
    processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    check_signal(processes, corpus, run_alone, tmp_path, FOUR, signal.SIGTERM, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 10))
def test_signals_to_any_rank_on_any_layout(
    seed: int, processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    mesh, number = sessions.LAYOUTS[1 + seed % (len(sessions.LAYOUTS) - 1)], (signal.SIGTERM, signal.SIGINT)[seed % 2]
    check_signal(processes, corpus, run_alone, tmp_path, mesh, number, seed)
