"""What the tests of whole runs do in other processes: train, die at a chosen instant, be slow.

Those are forked from a process that has imported this module, so what a run imports later is imported here at once.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.fx.experimental.symbolic_shapes  # noqa: F401  (by the first backward pass)

import launch.compose
import launch.train  # noqa: F401
from launch.main import main
from trainer import checkpoint, machine, row, writer
from trainer.config import TrainConfig
from trainer.run import train

FILE_OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
SLOW_ROW_S = 120
RATE_S = 0.001
"""How long a start measures the rate of the machine, which decides nothing here."""


def train_there(config: TrainConfig, log: Path) -> None:
    """Train as the command does; the process ends with the run's exit code, what it says goes to `log`."""
    begin(log, log)
    sys.exit(train(config))


def command(words: list[str], out: Path, err: Path) -> None:
    """Run a `keel` command; the process ends with its exit code."""
    begin(out, err)
    sys.exit(main(words))


def die_while_saving(config: TrainConfig, log: Path, save: int, operation: int) -> None:
    """Train, but be killed before the `operation`-th change to the file system of the `save`-th checkpoint."""
    saves, left = 0, operation
    inside = False
    whole_save = checkpoint.save

    def save_and_count(*arguments: Any) -> Path:
        nonlocal saves, inside
        saves += 1
        inside = saves == save
        path = whole_save(*arguments)
        inside = False
        return path

    def count() -> None:
        nonlocal left
        if inside and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= inside

    for name in FILE_OPERATIONS:
        setattr(os, name, _after(count, getattr(os, name)))
    writer.checkpoint.save = save_and_count
    train_there(config, log)


def command_with_a_slow_row(words: list[str], log: Path, rows_before: int) -> None:
    """Run a `keel` command whose training hangs in a row after `rows_before` rows."""
    learned = row.learn
    count = 0

    def learn_slowly(*arguments: Any) -> row.RowSums:
        nonlocal count
        count += 1
        if count > rows_before:
            print("a slow row begins", flush=True)
            time.sleep(SLOW_ROW_S)
        return learned(*arguments)

    row.learn = learn_slowly
    command(words, log, log)


def _after(before: Callable[[], None], operation: Callable[..., object]) -> Callable[..., object]:
    def counted(*arguments: object, **options: object) -> object:
        before()
        return operation(*arguments, **options)

    return counted


def begin(out: Path, err: Path) -> None:
    """What this process writes goes to the ends of two files, which may be one; no long measurement."""
    machine.SECONDS = RATE_S
    for descriptor, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
