"""Proves with ranks that are processes: saved on some, read on others; one killed while saving harms nothing."""

import shutil
import signal
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.trainer import crews
from tests.trainer.checkpoint_samples import state_of
from trainer import checkpoint
from trainer.writer import Writer

MOST_OPERATIONS = 14
"""More than any rank does to the file system for one checkpoint."""


def assert_well(folder: Path) -> None:
    failures = [path.read_text() for path in folder.glob("*.failed")]
    assert not failures, failures[0]


def test_saved_on_some_ranks_and_read_on_others(processes: BaseContext, tmp_path: Path) -> None:
    for size, readers, steps in ((4, 1, 2), (3, 2, 3), (2, 3, 2)):
        folder = tmp_path / str(size)
        folder.mkdir()
        codes = crews.start(processes, size, crews.save_steps, folder, steps, size)
        assert_well(folder)
        assert codes == [0] * size
        codes = crews.start(processes, readers, crews.read_newest, folder, steps, size)
        assert_well(folder)
        assert codes == [0] * readers


def kill_one(processes: BaseContext, folder: Path, victim: int, operation: int) -> bool:
    """Kill a rank while three save step 2 beside step 1, and go on from there; whether it lived to the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    checkpoints = folder / "checkpoints"
    crews.save(checkpoints, 1, crews.shared_out(1, 2, 1))
    codes = crews.start(processes, 3, crews.die_while_saving, folder, 2, victim, operation)
    assert_well(folder)
    lived = codes[victim] == 0
    assert codes == [0 if lived or rank != victim else -signal.SIGKILL for rank in range(3)]
    told = {int(path.stem.removeprefix("rank-")): path.read_text() for path in folder.glob("*.told")}
    assert told.keys() == (set() if lived else {0, 1, 2} - {victim})
    assert all("step-000002: perhaps not saved: a rank does not answer" in text for text in told.values())
    found = checkpoint.recover(checkpoints, lambda line: None)
    assert found is not None
    assert found.step in ((2,) if lived else (1, 2) if victim == 0 else (1,))
    assert found.state == state_of(found.step)
    assert crews.wrong_after_restoring(found, found.step, 2, operation) == []
    Writer(checkpoints, keep_last=3, keep_every_steps=0).close()
    assert not [path for path in checkpoints.iterdir() if path.name.startswith(".")]
    assert crews.save(checkpoints, 2, crews.shared_out(3, 2, 3)) == [checkpoints / "step-000002"] * 2
    return lived


@pytest.mark.parametrize(("victim", "operation"), [(0, 0), (0, 2), (0, 5), (1, 0), (2, 1)])
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(
    processes: BaseContext, tmp_path: Path, victim: int, operation: int
) -> None:
    assert not kill_one(processes, tmp_path / "run", victim, operation)


@pytest.mark.slow
def test_any_rank_killed_before_any_change_to_the_file_system(processes: BaseContext, tmp_path: Path) -> None:
    for victim in range(3):
        lived = [kill_one(processes, tmp_path / "run", victim, operation) for operation in range(MOST_OPERATIONS)]
        assert lived == sorted(lived), "who survives the n-th change survives later ones"
        assert lived[-1]
        assert sum(not survived for survived in lived) >= (9 if victim == 0 else 2)
