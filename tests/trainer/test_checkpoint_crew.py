"""Proves that ranks save one checkpoint together, that any layout reads it bit for bit, and that a failure is of all.

The ranks are threads here; in test_checkpoint_ranks.py they are processes.
"""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import crews
from tests.trainer.checkpoint_samples import same_bits, state_of
from tests.trainer.crews import Thread, piece
from trainer import checkpoint, durable, manifest, shard, writer
from trainer.manifest import CheckpointError, data_file
from trainer.pieces import Piece, whole
from trainer.reader import Reader
from trainer.writer import Writer

Of = list[dict[str, list[Piece]]]


@pytest.fixture(params=[64, manifest.BLOCK_BYTES], ids=["small blocks", "blocks as they are"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a block: with 64 every tensor has many, and no row begins where a block does."""
    crews.set_block_bytes(monkeypatch, request.param)
    return request.param


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# the way there and back


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_any_layout_reads_what_any_layout_wrote(tmp_path: Path, blocks: int, size: int) -> None:
    for seed in range(4):
        saved = crews.save(tmp_path, seed, crews.shared_out(seed, size, seed))
        assert saved == [tmp_path / f"step-{seed:06d}"] * size
        opened = Reader(saved[0])
        assert sorted(opened.names) == sorted(crews.many_of(seed))
        for others in (1, 2, 3):
            assert crews.wrong_after_restoring(opened, seed, others, seed + others) == []
        loaded = checkpoint.load(saved[0])
        assert all(same_bits(loaded.tensors[name], tensor) for name, tensor in crews.many_of(seed).items())
        assert loaded.state == state_of(seed)


def test_each_rank_writes_what_it_owns_and_nothing_else(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(8, 3)
    owned: Of = [
        {"x": [piece(tensor, 0, 2), piece(tensor, 5, 8)]},
        {"z": []},
        {"x": [piece(tensor, 2, 5)], "y": [piece(tensor, 0, 8)]},
    ]
    (path, *_) = crews.save(tmp_path, 1, owned)
    assert names(path) == ["COMMIT", "manifest.json", data_file(0), data_file(2)]
    first, third = load_file(path / data_file(0)), load_file(path / data_file(2))
    assert {key: len(value) for key, value in first.items()} == {"x[0:2]": 2, "x[5:8]": 3}
    assert torch.equal(first["x[5:8]"], tensor[5:8])
    assert {key: len(value) for key, value in third.items()} == {"x[2:5]": 3, "y": 8}


# what is refused, by all ranks and before a byte is written


X = torch.arange(40.0).reshape(10, 4)
REFUSED: dict[str, tuple[Of, str]] = {
    "rows twice": (
        [{"x": [piece(X, 0, 6)]}, {"x": [piece(X, 5, 10)]}],
        "tensor x: rows 5 to 6 are in rank-00000.safetensors and again in rank-00001.safetensors",
    ),
    "a name twice": (
        [whole({"x": X}), {}, whole({"x": X})],
        "tensor x: rows 0 to 10 are in rank-00000.safetensors and again in rank-00002.safetensors",
    ),
    "a scalar twice": (
        [whole({"x": torch.ones(())}), whole({"x": torch.ones(())})],
        "tensor x: rows 0 to 1 are in rank-00000.safetensors and again in rank-00001.safetensors",
    ),
    "an empty tensor twice": (
        [whole({"x": X[:0]}), whole({"x": X[:0]})],
        "tensor x: rows 0 to 0 are in rank-00000.safetensors and again in rank-00001.safetensors",
    ),
    "rows twice on one rank": (
        [{"x": [piece(X, 0, 6), piece(X, 4, 10)]}, {}],
        "tensor x: rows 4 to 6 are in rank-00000.safetensors and again in rank-00000.safetensors",
    ),
    "the same rows twice on one rank": (
        [{"x": [piece(X, 0, 6), piece(X, 0, 6)]}, {}],
        "rank 0: tensor x[0:6]: expected another name, this one is taken",
    ),
    "a gap": ([{"x": [piece(X, 0, 3)]}, {"x": [piece(X, 5, 10)]}], "tensor x: rows 3 to 5 of 10 are missing"),
    "no beginning": ([{}, {"x": [piece(X, 1, 10)]}], "tensor x: rows 0 to 1 of 10 are missing"),
    "no end": ([{"x": [piece(X, 0, 9)]}, {}], "tensor x: rows 9 to 10 of 10 are missing"),
    "no rows": (
        [{"x": [piece(X, 0, 0)]}, whole({"x": X})],
        "tensor x: rows 0 to 0 in rank-00000.safetensors: expected one row at least",
    ),
    "another dtype": (
        [{"x": [piece(X, 0, 5)]}, {"x": [piece(X.double(), 5, 10)]}],
        "tensor x: is float32 [10, 4] for rank-00000.safetensors and float64 [10, 4] for rank-00001.safetensors: "
        "expected one dtype and shape",
    ),
    "another shape": (
        [{"x": [piece(X, 0, 5)]}, {"x": [piece(torch.ones(11, 4), 5, 11)]}],
        "tensor x: is float32 [10, 4] for rank-00000.safetensors and float32 [11, 4] for rank-00001.safetensors: "
        "expected one dtype and shape",
    ),
    "no part of it": (
        [{"x": [piece(X, 0, 5)]}, {"x": [Piece(tensor=X, shape=(10, 4), start=5)]}],
        "rank 1: tensor x: [10, 4] from row 5 is no part of [10, 4]",
    ),
    "other columns": (
        [{"x": [piece(X, 0, 5)]}, {"x": [Piece(tensor=X[5:, :3], shape=(10, 4), start=5)]}],
        "rank 1: tensor x: [5, 3] from row 5 is no part of [10, 4]",
    ),
    "a dtype that cannot be saved": (
        [{}, whole({"x": torch.zeros(2, dtype=torch.complex64)})],
        "rank 1: tensor x: torch.complex64 cannot be saved",
    ),
    "a name like a part's": (
        [{"x": [piece(X, 0, 5)], "x[0:5]": [piece(X, 0, 10)]}, {"x": [piece(X, 5, 10)]}],
        "rank 0: tensor x[0:5]: expected another name, this one is taken",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pieces_that_are_not_each_row_once_are_refused_on_all_ranks(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crews.save(tmp_path, 1, crews.shared_out(1, 2, 0))
    before = names(tmp_path)
    monkeypatch.setattr(shard, "serialize_file", lambda *_: pytest.fail("something was written"))
    of_ranks, complaint = REFUSED[kind]
    outcomes = crews.save(tmp_path, 2, of_ranks)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert len(set(map(str, outcomes))) == 1
    assert str(outcomes[0]).startswith(f"{tmp_path / 'step-000002'}: not saved: {complaint}")
    assert "\n" not in str(outcomes[0])
    assert names(tmp_path) == before


# what fails on one rank fails on all


@pytest.mark.parametrize(("file", "rank"), [(data_file(2), 2), (data_file(0), 0), ("manifest.json", 0), ("COMMIT", 0)])
def test_a_full_disk_on_one_rank_is_the_same_error_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, rank: int
) -> None:
    crews.save(tmp_path, 1, crews.shared_out(1, 4, 0))
    crews.save(tmp_path, 2, crews.shared_out(2, 4, 0))
    real = durable.sync

    def full(path: Path) -> None:
        if path.name in (file, f".{file}.writing"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    for step in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "sync", full)
            outcomes = crews.save(tmp_path, step, crews.shared_out(9, 4, 0))
        assert {type(outcome) for outcome in outcomes} == {CheckpointError}
        (said,) = set(map(str, outcomes))
        assert said == f"{tmp_path}/step-00000{step}: not saved: rank {rank}: [Errno 28] No space left on device"
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert crews.wrong_after_restoring(Reader(tmp_path / "step-000002"), 2, 3, 0) == []
    assert crews.save(tmp_path, 3, crews.shared_out(3, 4, 0)) == [tmp_path / "step-000003"] * 4


def test_a_state_that_is_not_json_on_one_rank_stops_all(tmp_path: Path) -> None:
    outcomes = crews.each(
        crews.threads(3), lambda rank: checkpoint.save(tmp_path, 1, {}, {"x": {1} if rank.rank == 1 else 1}, rank)
    )
    assert all("not saved: rank 1: state.x = {1}: expected a JSON value" in str(outcome) for outcome in outcomes)
    assert names(tmp_path) == []


@pytest.mark.parametrize("gathers", [0, 1, 2, 3])
def test_a_rank_that_dies_leaves_what_was_there(tmp_path: Path, gathers: int) -> None:
    """Before its n-th word to the others: nothing that it did not confirm is committed."""
    crews.save(tmp_path, 1, crews.shared_out(1, 3, 0))

    def dying(rank: Thread) -> Path:
        if rank.rank == 1:
            mortal(rank, gathers)
        return checkpoint.save(tmp_path, 2, crews.shared_out(2, 3, 0)[rank.rank], state_of(2), rank)

    outcomes = crews.each(crews.threads(3), dying)
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome, CheckpointError)
        assert str(outcome).startswith(f"{tmp_path / 'step-000002'}: perhaps not saved: a rank does not answer")
    found = checkpoint.newest_valid(tmp_path, lambda line: None)
    assert found is not None
    # After its third word, that its file is on the disk, rank 0 can do without it.
    assert found.step == 1 or gathers == 3
    assert crews.wrong_after_restoring(found, found.step, 2, 0) == []
    crews.each(crews.threads(3), lambda rank: Writer(tmp_path, 3, 0, rank).close())
    assert names(tmp_path) == [f"step-00000{step}" for step in (1, 2) if step <= found.step]


def mortal(rank: Thread, gathers: int) -> None:
    """Die instead of the gather after so many."""
    gather, left = rank.gather, gathers

    def gather_or_die(thing: Any) -> list[Any]:
        nonlocal left
        if left == 0:
            rank.die()
        left -= 1
        return gather(thing)

    rank.gather = gather_or_die


def test_leftovers_are_removed_by_rank_0_alone(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-000002").mkdir()
    (_, second) = crews.threads(2)
    Writer(tmp_path, 3, 0, second).close()
    assert names(tmp_path) == [".writing-step-000002"]


# in the background


def test_writers_of_all_ranks_save_and_prune_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune, pruned = writer.prune, []
    monkeypatch.setattr(writer, "prune", lambda *a: (pruned.append(a), prune(*a)))

    def work(rank: Thread) -> None:
        mine = Writer(tmp_path, 2, 4, rank)
        for step in range(1, 8):
            live = {
                name: [replace(part, tensor=part.tensor.clone()) for part in parts]
                for name, parts in crews.shared_out(step, 3, step)[rank.rank].items()
            }
            mine.submit(step, live, state_of(step))
            for parts in live.values():
                for part in parts:
                    part.tensor.zero_()
        mine.close()

    assert crews.each(crews.threads(3), work) == [None] * 3
    assert names(tmp_path) == ["step-000004", "step-000006", "step-000007"]
    assert len(pruned) == 7
    for step in (4, 6, 7):
        assert crews.wrong_after_restoring(Reader(tmp_path / f"step-{step:06d}"), step, 2, step) == []


@pytest.mark.parametrize("of", ["write", "prune"])
def test_an_error_behind_one_rank_surfaces_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    serialize = shard.serialize_file

    def refuse(specs: object, path: Path) -> None:
        if path.name == data_file(1):
            raise OSError(errno.EIO, "bad disk")
        serialize(specs, path)

    monkeypatch.setattr(*((shard, "serialize_file", refuse) if of == "write" else (writer, "prune", lambda *a: 1 / 0)))

    def work(rank: Thread) -> None:
        mine = Writer(tmp_path, 2, 0, rank)
        mine.submit(1, crews.shared_out(1, 3, 0)[rank.rank], state_of(1))
        mine.close()

    outcomes = crews.each(crews.threads(3), work)
    cause = "rank 1: [Errno 5] bad disk" if of == "write" else "rank 0: ZeroDivisionError: division by zero"
    assert all(isinstance(outcome, CheckpointError) and cause in str(outcome) for outcome in outcomes)
    assert names(tmp_path) == ([] if of == "write" else ["step-000001"])
