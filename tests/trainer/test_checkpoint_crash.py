"""Proves that no instant of dying, and no full disk, loses a checkpoint that was complete or lets a torn one pass."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.trainer.checkpoint_samples import (
    assert_is_step,
    die_at_operation,
    state_of,
    tensors_of,
    write_for_ever,
)
from trainer import checkpoint, durable
from trainer.manifest import CheckpointError
from trainer.pieces import whole
from trainer.reader import read_manifest
from trainer.writer import Writer


def kill_while_writing(processes: BaseContext, folder: Path, after_s: float) -> int:
    """Lets a run save for `after_s` seconds, kills it, and returns the newest step it knew to be on the disk."""
    ours, theirs = processes.Pipe()
    child = processes.Process(target=write_for_ever, args=(folder, theirs))
    child.start()
    theirs.close()
    assert ours.poll(60), "the child did not start"
    time.sleep(after_s)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    committed = 0
    while ours.poll():
        try:
            committed = ours.recv()
        except EOFError:
            break
    return committed


def kill_many_times(processes: BaseContext, folder: Path, times: int, seed: int) -> int:
    draw, newest = random.Random(seed), 0
    for _ in range(times):
        committed = kill_while_writing(processes, folder, draw.uniform(0.0, 0.12))
        found = checkpoint.newest_valid(folder, lambda line: None)
        step = 0 if found is None else found.step
        assert step >= max(committed, newest), "a checkpoint that was complete is gone"
        if found is not None:
            assert_is_step(checkpoint.load(found.path), step)
        newest = step
    return newest


def test_killed_ten_times_nothing_is_lost(processes: BaseContext, tmp_path: Path) -> None:
    assert kill_many_times(processes, tmp_path, 10, seed=1) > 5


@pytest.mark.slow
def test_killed_thirty_times_nothing_is_lost(processes: BaseContext, tmp_path: Path) -> None:
    assert kill_many_times(processes, tmp_path, 30, seed=2) > 30


def is_whole(path: Path) -> bool:
    """Whether a folder that looks committed is; one that does not look so is no danger."""
    try:
        read_manifest(path)
    except CheckpointError:
        return True
    return checkpoint.load(path).step > 0


def test_dying_before_each_operation_leaves_the_old_or_the_new(processes: BaseContext, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for step in (1, 2):
        checkpoint.save(base, step, whole(tensors_of(step)), state_of(step))
    found_steps = []
    for number in range(100):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        child = processes.Process(target=die_at_operation, args=(number, folder, 3, 2))
        child.start()
        child.join()
        found = checkpoint.newest_valid(folder, lambda line: None)
        assert found is not None
        assert_is_step(checkpoint.load(found.path), found.step)
        found_steps.append(found.step)
        assert all(is_whole(path) for path in checkpoint.steps(folder).values())
        again = checkpoint.recover(folder, lambda line: None)
        assert again is not None
        assert again.step == found.step
        writer = Writer(folder, keep_last=2, keep_every_steps=0)
        writer.submit(3, whole(tensors_of(3)), state_of(3))
        writer.close()
        assert_is_step(checkpoint.load(folder / "step-000003"), 3)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert found_steps == sorted(found_steps)
    assert found_steps[0] == 2
    assert found_steps[-1] == 3
    assert len(found_steps) > 12


def test_everything_is_on_the_disk_before_the_name_and_the_name_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    where = {}

    def note(operation: str, path: object) -> None:
        seen.append(f"{operation} {Path(str(path)).relative_to(tmp_path)}")

    def synced(descriptor: int) -> None:
        note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda a, b: (note("name", b), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (note("name", b), replace(a, b)))
    checkpoint.save(tmp_path, 7, whole(tensors_of(7)), {})
    for number, operation in enumerate(seen):
        where.setdefault(operation, number)
    working, final = ".writing-step-000007", "step-000007"
    order = [
        f"sync {working}/rank-00000.safetensors",
        f"sync {working}/.manifest.json.writing",
        f"name {working}/manifest.json",
        f"sync {working}",
        f"name {final}",
        "sync .",
        f"sync {final}/.COMMIT.writing",
        f"name {final}/COMMIT",
        f"sync {final}",
    ]
    assert [operation for operation in order if operation not in where] == []
    assert sorted(order, key=where.__getitem__) == order


# a disk that is full


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json", "COMMIT"])
def test_a_full_disk_is_named_and_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    checkpoint.save(tmp_path, 1, whole(tensors_of(1)), state_of(1))
    checkpoint.save(tmp_path, 2, whole(tensors_of(2)), state_of(2))
    real = durable.sync

    def full(path: Path) -> None:
        if path.name in (file, f".{file}.writing"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    for step in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "sync", full)
            with pytest.raises(CheckpointError, match=rf"step-00000{step}: not saved: .*No space left on device"):
                checkpoint.save(tmp_path, step, whole(tensors_of(99)), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert_is_step(checkpoint.load(tmp_path / "step-000002"), 2)


def test_a_real_limit_on_file_size_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, whole(tensors_of(1)), state_of(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-000002: not saved: .*File too large"):
            checkpoint.save(tmp_path, 2, whole(tensors_of(2)), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; skipped where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_the_last_whole_checkpoint(small_disk: Path) -> None:
    def save_many() -> None:
        for step in range(1, 20):
            checkpoint.save(small_disk, step, whole(tensors_of(step)), state_of(step))

    with pytest.raises(CheckpointError, match="No space left on device"):
        save_many()
    found = checkpoint.newest_valid(small_disk, pytest.fail)
    assert found is not None
    assert found.step > 1
    assert_is_step(checkpoint.load(found.path), found.step)
    assert not [path for path in small_disk.iterdir() if path.name.startswith(".")]
