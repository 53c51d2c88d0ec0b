"""Proves that a run that is killed at any instant, or asked to stop, ends with the bits of one that nobody touched."""

import contextlib
import multiprocessing
import os
import random
import re
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.runs import children, tiny
from trainer import checkpoint
from trainer.config import CheckpointConfig, TrainConfig
from trainer.folder import RunFolder
from trainer.run import train

Processes = multiprocessing.context.BaseContext
PATIENCE_S = 120


def often_saved(corpus: Path, runs_dir: Path) -> TrainConfig:
    """A run that saves every second step, so that kills fall before, between and into checkpoints."""
    return tiny.config(corpus, runs_dir, checkpoint=CheckpointConfig(every_steps=2, keep_last=2))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that nobody touched."""
    config = often_saved(corpus, tmp_path_factory.mktemp("whole"))
    train(config)
    return tiny.only_run(Path(config.runs_dir))


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> TrainConfig:
    return often_saved(corpus, tmp_path / "runs")


def rows_told(runs_dir: Path) -> int:
    """Whole rows of metrics of the only run, 0 before there is one."""
    files = list(runs_dir.glob("[!.]*/metrics.jsonl"))
    return files[0].read_bytes().count(b"\n") if files else 0


def wait_for_rows(child: BaseProcess, runs_dir: Path, rows: int) -> None:
    """Return once the run has told of `rows` steps, or the child has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while child.is_alive() and rows_told(runs_dir) < rows:
        assert time.monotonic() < deadline, "the child makes no progress"
        time.sleep(0.001)


def kill_until_finished(processes: Processes, config: TrainConfig, draw: random.Random) -> int:
    """Start the same command again and again and kill it: while it sets up, in a step, in a save; returns the kills.

    One of three instants is drawn from the first half second, the others from the time after a step of the next few.
    """
    runs_dir, kills = Path(config.runs_dir), 0
    log = runs_dir.with_suffix(".log")
    while True:
        child = processes.Process(target=children.train_there, args=(config, log))
        child.start()
        if draw.random() < 1 / 3:
            child.join(draw.uniform(0, 0.5))
        else:
            wait_for_rows(child, runs_dir, rows_told(runs_dir) + draw.randint(1, 3))
            child.join(draw.uniform(0, 0.2))
        child.kill()
        child.join()
        if child.exitcode == 0:
            return kills
        assert child.exitcode == -signal.SIGKILL, log.read_text()
        kills += 1
        if any(RunFolder(path).is_finished() for path in runs_dir.glob("[!.]*")):
            # Killed on its way out: the same command would begin another run.
            return kills


def kill_often(processes: Processes, corpus: Path, folder: Path, whole: RunFolder, kills: int, seed: int) -> None:
    """Chains of kills, each chain one run, until there were enough."""
    draw, chain = random.Random(seed), 0
    while kills > 0:
        chain += 1
        config = often_saved(corpus, folder / f"{chain}")
        kills -= kill_until_finished(processes, config, draw)
        tiny.assert_same_run(tiny.only_run(Path(config.runs_dir)), whole)


def test_killed_four_times(processes: Processes, corpus: Path, tmp_path: Path, whole: RunFolder) -> None:
    kill_often(processes, corpus, tmp_path, whole, kills=4, seed=1)


@pytest.mark.slow
def test_killed_forty_times(processes: Processes, corpus: Path, tmp_path: Path, whole: RunFolder) -> None:
    kill_often(processes, corpus, tmp_path, whole, kills=40, seed=2)


def killed_while_saving(processes: Processes, config: TrainConfig, save: int, operation: int) -> bool:
    """Whether the process died there, as it should; False if a save has no such operation."""
    log = Path(config.runs_dir).with_suffix(".log")
    child = processes.Process(target=children.die_while_saving, args=(config, log, save, operation))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), log.read_text()
    return child.exitcode != 0


@pytest.mark.parametrize(("save", "operation"), [(1, 3), (2, 6), (3, 9)])
def test_killed_while_saving(
    processes: Processes, config: TrainConfig, whole: RunFolder, save: int, operation: int
) -> None:
    assert killed_while_saving(processes, config, save, operation)
    train(config)
    tiny.assert_same_run(tiny.only_run(Path(config.runs_dir)), whole)


@pytest.mark.slow
def test_killed_at_each_operation_of_a_save(
    processes: Processes, corpus: Path, tmp_path: Path, whole: RunFolder
) -> None:
    operation = 0
    config = often_saved(corpus, tmp_path / "0")
    while killed_while_saving(processes, config, 2, operation):
        train(config)
        tiny.assert_same_run(tiny.only_run(Path(config.runs_dir)), whole)
        operation += 1
        config = often_saved(corpus, tmp_path / f"{operation}")
    assert operation > 10


# asked to stop


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(
    processes: Processes, config: TrainConfig, whole: RunFolder, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    log = tmp_path / "log"
    child = processes.Process(target=children.train_there, args=(config, log))
    child.start()
    wait_for_rows(child, Path(config.runs_dir), 3)
    signal_to(child, number)
    child.join()
    assert child.exitcode == code, log.read_text()
    run_folder = tiny.only_run(Path(config.runs_dir))
    steps = rows_told(Path(config.runs_dir))
    assert 3 <= steps < tiny.STEPS
    assert f"stopped after step {steps} ({number.name}), saved. To go on: ./keel resume {run_folder.path}\n" in (
        log.read_text()
    )
    assert max(checkpoint.steps(run_folder.checkpoints)) == steps
    assert run_folder.history()[-1] | {"time": ""} == {"time": "", "event": "end", "step": steps, "reason": number.name}
    train(config)
    tiny.assert_same_run(run_folder, whole)


def test_the_second_interrupt_ends_at_once(
    processes: Processes, config: TrainConfig, whole: RunFolder, tmp_path: Path
) -> None:
    """In a row that would take two minutes: the first Ctrl-C waits for it, the second does not."""
    train(config, stop_at=3)
    run_folder = tiny.only_run(Path(config.runs_dir))
    log = tmp_path / "log"
    words = ["resume", str(run_folder.path)]
    child = processes.Process(target=children.command_with_a_slow_row, args=(words, log, 1))
    child.start()
    deadline = time.monotonic() + PATIENCE_S
    while not (log.exists() and "a slow row begins" in log.read_text()):
        assert time.monotonic() < deadline, "the child makes no progress"
        time.sleep(0.01)
    signal_to(child, signal.SIGINT)
    child.join(0.5)
    assert child.is_alive()
    press_again(child, children.SLOW_ROW_S / 2)
    assert child.exitcode == 130, log.read_text()
    assert log.read_text().endswith("keel: interrupted\n")
    assert re.match("KeyboardInterrupt", run_folder.history()[-1]["reason"])
    train(config)
    tiny.assert_same_run(run_folder, whole)


def press_again(child: BaseProcess, patience_s: float) -> None:
    """Interrupt now and every five seconds until the child ends: on a busy machine two signals can reach it as one."""
    deadline = time.monotonic() + patience_s
    while child.is_alive() and time.monotonic() < deadline:
        signal_to(child, signal.SIGINT)
        child.join(5)


def signal_to(child: BaseProcess, number: signal.Signals) -> None:
    """Send a signal to a child; its exit code tells whether it still lived."""
    assert child.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, number)
