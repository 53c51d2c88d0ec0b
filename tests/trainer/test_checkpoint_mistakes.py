"""Deliberate mistakes in saving and reading by many ranks: what a right checkpoint passes must see each."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import crews
from tests.trainer.crews import Thread, piece
from trainer import checkpoint, pieces, shard
from trainer.manifest import CheckpointError, data_file
from trainer.pieces import whole
from trainer.reader import Reader

STEP, SIZE = 3, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    crews.set_block_bytes(monkeypatch, 64)


def comes_back(folder: Path) -> bool:
    """Whether what four ranks save is what three read."""
    crews.save(folder, STEP, crews.shared_out(STEP, SIZE, 1))
    try:
        opened = Reader(folder / f"step-{STEP:06d}")
        opened.verify()
        return crews.wrong_after_restoring(opened, STEP, 3, 2) == []
    except CheckpointError:
        return False


def rows_one_too_late(patch: pytest.MonkeyPatch) -> None:
    rows = Reader._read
    patch.setattr(Reader, "_read", lambda self, name, of, low, into: rows(self, name, of, max(low - 1, 0), into))


def places_in_the_file_exchanged(patch: pytest.MonkeyPatch) -> None:
    header = shard._read_header

    def swapped(path: Path) -> Any:
        entry, starts = header(path)
        return entry, dict(zip(starts, reversed(starts.values()), strict=True))

    patch.setattr(shard, "_read_header", swapped)


def rows_of_another_rank(patch: pytest.MonkeyPatch) -> None:
    """Each rank writes the right number of rows, from one row further on."""
    write = shard.write

    def shifted(path: Path, parts: pieces.Pieces) -> shard.Shard:
        moved = {
            name: [replace(one, tensor=one.tensor.roll(1, 0)) if one.tensor.dim() else one for one in of]
            for name, of in parts.items()
        }
        return write(path, moved)

    patch.setattr(shard, "write", shifted)


def a_rank_forgotten(patch: pytest.MonkeyPatch) -> None:
    merge = shard.merge
    patch.setattr(shard, "merge", lambda step, of, shards, state: merge(step, of, [*shards[:-1], None], state))


def bytes_after_the_hash(patch: pytest.MonkeyPatch) -> None:
    """What changes between hashing and the disk, as a bad disk or controller would do it."""
    write = shard.write

    def rotting(path: Path, parts: pieces.Pieces) -> shard.Shard:
        written = write(path, parts)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return written

    patch.setattr(shard, "write", rotting)


def test_without_a_mistake_it_comes_back(tmp_path: Path) -> None:
    assert comes_back(tmp_path)


@pytest.mark.parametrize(
    "mistake",
    [rows_one_too_late, places_in_the_file_exchanged, rows_of_another_rank, a_rank_forgotten, bytes_after_the_hash],
)
def test_a_mistake_is_seen(
    tmp_path: Path, mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    assert not comes_back(tmp_path)


@pytest.mark.parametrize("kind", ["twice", "a gap"])
def test_the_manifest_is_checked_again_before_the_commit(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the ranks' first check of their pieces fail to see it."""
    x = torch.randn(6, 2)
    monkeypatch.setattr(pieces, "check_ranks", lambda of_ranks: None)
    of_ranks = [whole({"x": x}), whole({"x": x})] if kind == "twice" else [{"x": [piece(x, 0, 2)]}, {}]
    outcomes = crews.save(tmp_path, 1, of_ranks)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert all("not saved: rank 0: manifest.json: tensor x: rows" in str(outcome) for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_a_rank_keeps_to_itself_is_seen_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, sync = checkpoint.together, shard.durable.sync

    def deaf(crew: Thread, action: Callable[[], Any]) -> list[Any]:
        def quiet() -> Any:
            try:
                return action()
            except OSError:
                return None

        return together(crew, quiet)

    def full(path: Path) -> None:
        if path.name == data_file(2):
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint, "together", deaf)
    monkeypatch.setattr(shard.durable, "sync", full)
    outcomes = crews.save(tmp_path, 1, crews.shared_out(1, 4, 0))
    assert all("not saved: rank 0: manifest.json: tensor" in str(outcome) for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []
