"""Checkpoints: a folder of safetensors and a manifest, complete when `COMMIT` is there, verified whenever it is read.

    checkpoints/step-000600/rank-00000.safetensors   the tensors that rank 0 owns; any safetensors reader opens it
    checkpoints/step-000600/manifest.json            where each tensor is, hash per block, the run's state (manifest.py)
    checkpoints/step-000600/COMMIT                   SHA-256 of the manifest, written last

Saving writes a folder `.writing-step-000600` beside, each rank its own file, syncs each, renames the folder and then
writes COMMIT, so a crash leaves a folder that does not count. Nothing is overwritten: a folder in the way, like a
damaged one, is renamed `step-000600.set-aside-1` and stays until somebody deletes it. Reading never changes anything;
only `recover` does. The folder is on a file system that all ranks share.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import durable, pieces, shard
from trainer.crew import ALONE, Crew, Lost, Trouble, first, together
from trainer.manifest import (
    COMMIT,
    MANIFEST,
    CheckpointError,
    FormatError,
    checked_state,
    commit_of,
    data_file,
    decode,
    step_of,
)
from trainer.pieces import Outline, Pieces
from trainer.reader import Reader
from trainer.shard import Shard


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loaded:
    """A verified checkpoint: whole tensors on the CPU in the order they were saved in, and the run's state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, parts: Pieces, state: Mapping[str, Any], crew: Crew = ALONE) -> Path:
    """Writes one checkpoint durably and returns its folder; any dtype of `manifest.DTYPES`, any shape and device.

    All ranks of the crew call it, each with its own pieces; the state is rank 0's. Raises CheckpointError on all of
    them when it cannot be written (full disk, rows given twice or not at all, ...): then no folder with COMMIT appears
    and all checkpoints that were there are as before. Where a rank is gone, the others cannot know; it counts or not
    when it is read.
    """
    assert step >= 0, "folders are named by the step"
    target = folder / f"step-{step:06d}"
    working = folder / f".writing-{target.name}"
    try:
        checked = together(crew, lambda: _checked(parts, state, crew))
        outlines = [outlined for outlined, _ in checked]
        pieces.check_ranks(outlines)
        first(crew, lambda: _make(working))
        shards = together(crew, lambda: _write(working, parts, crew))
        first(crew, lambda: _commit(working, target, step, outlines, shards, checked[0][1]))
    except Lost as lost:
        raise CheckpointError(f"{target}: perhaps not saved: {lost}") from lost
    except CheckpointError as error:
        if crew.rank == 0:
            shutil.rmtree(working, ignore_errors=True)
        raise CheckpointError(f"{target}: not saved: {error}") from error
    return target


def load(path: Path) -> Loaded:
    """Reads and verifies every byte of the checkpoint at `path`.

    Raises CheckpointError with the file, the tensor and what was found where anything is missing or differs.
    """
    reader = Reader(path)
    reader.verify_headers()
    tensors = {name: reader.whole(name) for name in reader.names}
    return Loaded(step=reader.step, tensors=tensors, state=reader.state)


def newest_valid(folder: Path, report: Callable[[str], None]) -> Reader | None:
    """The newest checkpoint that verifies, or None; one line of report for each that does not. Changes nothing.

    Raises ValueError where it is of another format.
    """
    return _search(folder, ALONE, lambda path, error: report(f"checkpoint {path.name} cannot be used: {error}"))


def recover(folder: Path, report: Callable[[str], None], crew: Crew = ALONE) -> Reader | None:
    """`newest_valid` for the ranks that will write here: what cannot be used is set aside and never counts.

    Each rank verifies a share, all return the same checkpoint, rank 0 reports. Raises CheckpointError on all ranks
    where one cannot be set aside.
    """

    def reject(path: Path, error: CheckpointError) -> None:
        aside = first(crew, lambda: set_aside(path).name)
        if crew.rank == 0:
            report(f"checkpoint {path.name} cannot be used and is now {aside}: {error}")

    return _search(folder, crew, reject)


def steps(folder: Path) -> dict[int, Path]:
    """All folders named like a checkpoint, in ascending order of step, valid or not."""
    if not folder.is_dir():
        return {}
    found = ((step_of(path), path) for path in folder.iterdir())
    return dict(sorted((step, path) for step, path in found if step is not None))


def set_aside(path: Path) -> Path:
    """Renames a checkpoint so that it no longer counts, keeping its content; returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    path.rename(aside)
    durable.sync(path.parent)
    return aside


def remove(path: Path) -> None:
    """Deletes a checkpoint so that a crash half way leaves no folder that looks like one."""
    doomed = path.with_name(f".deleting-{path.name}")
    path.rename(doomed)
    durable.sync(path.parent)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed writer left half written or half deleted."""
    for pattern in (".writing-step-*", ".deleting-step-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def _search(folder: Path, crew: Crew, reject: Callable[[Path, CheckpointError], None]) -> Reader | None:
    for path in reversed(first(crew, lambda: list(steps(folder).values()))):
        try:
            return _verified(path, crew)
        except Trouble as trouble:
            if trouble.kind == FormatError.__name__:
                raise ValueError(f"checkpoint = {path}: {trouble}") from trouble
            reject(path, trouble)
    return None


def _verified(path: Path, crew: Crew) -> Reader:
    readers = []

    def verify() -> str:
        readers.append(Reader(path))
        readers[0].verify(crew.rank, crew.size)
        return (path / COMMIT).read_text()

    if len(set(together(crew, verify))) > 1:
        raise Trouble(f"{path / MANIFEST}: the ranks see different content")
    return readers[0]


def _checked(parts: Pieces, state: Mapping[str, Any], crew: Crew) -> tuple[dict[str, Outline], dict[str, Any]]:
    outlined, checked = pieces.outline(parts), checked_state(state)
    return outlined, checked if crew.rank == 0 else {}


def _make(working: Path) -> None:
    working.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()


def _write(working: Path, parts: Pieces, crew: Crew) -> Shard | None:
    """A rank's own file; a rank that has nothing writes none."""
    if not any(parts.values()):
        return None
    written = shard.write(working / data_file(crew.rank), parts)
    if crew.rank > 0:
        durable.sync(working)
    return written


def _commit(
    working: Path,
    target: Path,
    step: int,
    outlines: list[dict[str, Outline]],
    shards: list[Shard | None],
    state: dict[str, Any],
) -> None:
    """Writes and syncs the manifest, then gives the folder its name and commits it; on failure all is as before."""
    content = shard.merge(step, outlines, shards, state).encode()
    decode(content)
    durable.write(working / MANIFEST, content)
    displaced = set_aside(target) if target.exists() else None
    try:
        working.rename(target)
        durable.sync(target.parent)
        durable.write(target / COMMIT, commit_of(content))
    except OSError:
        shutil.rmtree(working if working.exists() else target, ignore_errors=True)
        if displaced is not None:
            displaced.rename(target)
        raise
