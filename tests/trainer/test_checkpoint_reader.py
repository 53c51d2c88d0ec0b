"""Proves that a reader gives exactly the rows asked for, reads no more than it needs, and trusts no byte unverified."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import crews
from tests.trainer.checkpoint_samples import same_bits
from tests.trainer.crews import piece
from trainer import checkpoint, manifest, reader
from trainer.manifest import CheckpointError, data_file, digest
from trainer.pieces import Piece, whole
from trainer.reader import Reader, restore

STEP = 8


@pytest.fixture(params=[64, manifest.BLOCK_BYTES], ids=["small blocks", "blocks as they are"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a block."""
    crews.set_block_bytes(monkeypatch, request.param)
    return request.param


@pytest.fixture
def saved(tmp_path: Path, blocks: int) -> Path:
    """A checkpoint of four ranks, beside an older one of two."""
    crews.save(tmp_path / "checkpoints", STEP - 1, crews.shared_out(STEP - 1, 2, 0))
    return crews.save(tmp_path / "checkpoints", STEP, crews.shared_out(STEP, 4, 1))[0]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# the rows asked for


def test_every_range_of_rows_of_every_tensor(saved: Path) -> None:
    opened = Reader(saved)
    for name, tensor in crews.many_of(STEP).items():
        assert opened.shape(name) == tensor.shape
        for start in range(0, len(tensor) if tensor.dim() else 0, 1 + len(tensor.reshape(-1)) // 40):
            for stop in (start, start + 1, (start + len(tensor) + 1) // 2, len(tensor)):
                found = opened.rows(name, start, stop)
                assert same_bits(found, tensor[start:stop])
                assert found.data_ptr() % 64 == 0


def test_targets_may_be_views_of_another_order(tmp_path: Path, blocks: int) -> None:
    tensor = torch.randn(12, 10)
    opened = Reader(checkpoint.save(tmp_path, 1, whole({"x": tensor}), {}))
    target = torch.zeros(10, 12).T
    restore(opened, whole({"x": target}), ["x"])
    assert torch.equal(target, tensor)


def test_restoring_holds_a_block_beside_the_targets(
    tmp_path: Path, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(1000, 300)
    opened = Reader(crews.save(tmp_path, 1, [{"x": [piece(tensor, 0, 501)]}, {"x": [piece(tensor, 501, 1000)]}])[0])
    target, empty, sizes = torch.zeros(333, 300), torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (made := empty(*a, **k), sizes.append(made.nbytes))[0])
    restore(opened, {"x": [Piece(tensor=target, shape=(1000, 300), start=400)]}, ["x"])
    assert torch.equal(target, tensor[400:733])
    assert max(sizes) <= blocks


def test_only_the_blocks_of_the_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crews.set_block_bytes(monkeypatch, 64)
    tensor = torch.randn(50, 8)
    (path, _) = crews.save(tmp_path, 1, [{"x": [piece(tensor, 0, 21)]}, {"x": [piece(tensor, 21, 50)]}])
    opened = Reader(path)
    read = note_blocks(monkeypatch)
    # 32 bytes a row, two rows a block, and the second piece begins with a block.
    assert torch.equal(opened.rows("x", 3, 25), tensor[3:25])
    assert read == [("x", data_file(0), number) for number in range(1, 11)] + [("x", data_file(1), n) for n in (0, 1)]


def note_blocks(patch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Every block that is read from now on: tensor, file, number within the piece."""
    real, read = Reader._read_block, []

    def noted(self: Reader, file: Any, name: str, of: manifest.PieceEntry, number: int, into: np.ndarray) -> None:
        read.append((name, of.file, number))
        real(self, file, name, of, number, into)

    patch.setattr(Reader, "_read_block", noted)
    return read


# no byte unverified


def test_a_flipped_bit_is_found_by_the_rows_it_is_in_and_by_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crews.set_block_bytes(monkeypatch, 64)
    tensor = torch.randn(50, 8)
    path = checkpoint.save(tmp_path, 1, whole({"x": tensor}), {})
    (entry,) = Reader(path).manifest.tensors["x"].pieces
    flip(path / data_file(0), entry.start + 7 * 64 + 33)
    for start, stop in ((14, 15), (15, 16), (0, 50), (13, 17), (15, 50)):
        where = rf"{data_file(0)}: tensor x, bytes {entry.start + 7 * 64} to {entry.start + 8 * 64}: SHA-256 is"
        with pytest.raises(CheckpointError, match=where):
            Reader(path).rows("x", start, stop)
    for start, stop in ((0, 14), (16, 50), (3, 3)):
        assert torch.equal(Reader(path).rows("x", start, stop), tensor[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 5)], ids=["a whole block", "a part of one"])
def test_what_was_verified_is_what_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, stop: int
) -> None:
    """Although the file changes as soon as its hash is taken."""
    tensor = torch.randn(10, 8)
    path = checkpoint.save(tmp_path, 1, whole({"x": tensor}), {})
    opened, file = Reader(path), path / data_file(0)
    opened.verify_headers()

    def hash_and_spoil(content: Any) -> str:
        found = digest(content)
        file.write_bytes(bytes(file.stat().st_size))
        return found

    monkeypatch.setattr(reader, "digest", hash_and_spoil)
    assert torch.equal(opened.rows("x", start, stop), tensor[start:stop])
    with pytest.raises(CheckpointError):
        opened.rows("x", start, stop)


def test_the_shares_of_all_ranks_are_every_block_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = note_blocks(monkeypatch)
    Reader(saved).verify()
    every = Counter(read)
    assert set(every.values()) == {1} or len(every) < len(read), "two pieces of a file may have the same numbers"
    for size in (2, 3, 5, 200):
        counts, together = [], Counter()
        for rank in range(size):
            read.clear()
            Reader(saved).verify(rank, size)
            counts.append(len(read))
            together += Counter(read)
        assert together == every
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("size", [1, 3])
def test_damage_to_any_ranks_file_is_found_by_one_share_and_named(saved: Path, rank: int, size: int) -> None:
    path = saved / data_file(rank)
    content = path.read_bytes()
    tensors = Reader(saved).manifest.tensors.items()
    pieces = [(name, of) for name, entry in tensors for of in entry.pieces if of.file == path.name]
    for name, of in pieces:
        if of.start == of.stop:
            continue
        flip(path, of.stop - 1)
        said = [complaint for share in range(size) if (complaint := trouble(saved, share, size))]
        assert len(said) == 1
        assert f"{path}: tensor {name}" in said[0]
        assert f" to {of.stop}: SHA-256 is" in said[0]
        path.write_bytes(content)
    for damage in (
        content[:-1],
        content[: len(content) // 2],
        b"",
        content + b"x",
        bytes([content[0] ^ 1]) + content[1:],
    ):
        path.write_bytes(damage)
        assert any(f"{path}: " in trouble(saved, share, size) for share in range(size))
    path.unlink()
    assert any(f"{path}: " in trouble(saved, share, size) for share in range(size))


def trouble(path: Path, rank: int, size: int) -> str:
    try:
        Reader(path).verify(rank, size)
    except CheckpointError as error:
        return str(error)
    return ""


# all ranks agree


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("rank", range(4))
def test_ranks_recover_the_same_checkpoint_whoever_finds_the_damage(saved: Path, rank: int, size: int) -> None:
    flip(saved / data_file(rank), -1)
    lines: list[str] = []
    found = crews.each(crews.threads(size), lambda crew: checkpoint.recover(saved.parent, lines.append, crew))
    assert {opened.path.name for opened in found} == {f"step-{STEP - 1:06d}"}
    assert sorted(path.name for path in saved.parent.iterdir()) == [f"step-{STEP - 1:06d}", f"{saved.name}.set-aside-1"]
    (line,) = lines
    assert line.startswith(f"checkpoint {saved.name} cannot be used and is now {saved.name}.set-aside-1: ")
    assert f"{saved / data_file(rank)}: tensor " in line
    assert all(crews.wrong_after_restoring(opened, STEP - 1, 3, 7) == [] for opened in found)


def test_ranks_find_nothing_together(tmp_path: Path) -> None:
    assert crews.each(crews.threads(3), lambda crew: checkpoint.recover(tmp_path, pytest.fail, crew)) == [None] * 3


def test_a_checkpoint_that_cannot_be_set_aside_is_an_error_of_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(saved / data_file(0), -1)

    def refuse(path: Path) -> Path:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoint, "set_aside", refuse)
    found = crews.each(crews.threads(3), lambda crew: checkpoint.recover(saved.parent, pytest.fail, crew))
    assert all(str(error) == "rank 0: [Errno 1] Operation not permitted" for error in found)


@pytest.mark.parametrize("size", [1, 3])
def test_another_format_is_refused_and_stays_where_it_is(saved: Path, size: int) -> None:
    content = (saved / "manifest.json").read_bytes().replace(b"keel-checkpoint-2", b"keel-checkpoint-1")
    (saved / "manifest.json").write_bytes(content)
    (saved / "COMMIT").write_bytes(manifest.commit_of(content))
    said = r"format = keel-checkpoint-1: expected keel-checkpoint-2"
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(saved)
    for error in crews.each(crews.threads(size), lambda crew: checkpoint.recover(saved.parent, pytest.fail, crew)):
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"checkpoint = {saved}: ")
        assert said in str(error)
    assert saved.is_dir()


# restoring


Tensors = dict[str, torch.Tensor]
ROW = "one row"


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({ROW: change(tensors[ROW])})


WRONG: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda of: of.update(more=torch.ones(1)), "more = nothing: expected a tensor"),
    "unknown": (lambda of: of.pop(ROW), "one row = a tensor: expected none of this name"),
    "renamed": (lambda of: of.update(other=of.pop(ROW)), "one row = a tensor: expected none of this name"),
    "rows": (changed(lambda x: x.repeat(2, 1)), "one row = int16 [1, 33]: expected int16 [2, 33]"),
    "columns": (changed(lambda x: x[:, 1:]), "one row = int16 [1, 33]: expected int16 [1, 32]"),
    "dimensions": (changed(lambda x: x[0]), "one row = int16 [1, 33]: expected int16 [33]"),
    "dtype": (changed(torch.Tensor.int), "one row = int16 [1, 33]: expected int32 [1, 33]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_targets_that_are_not_the_checkpoints_tensors_are_refused_before_anything_is_read(
    saved: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, complaint = WRONG[kind]
    targets = {name: torch.zeros_like(tensor) for name, tensor in crews.many_of(STEP).items()}
    spoil(targets)
    read = note_blocks(monkeypatch)
    with pytest.raises(ValueError, match=f"^checkpoint {re.escape(complaint)}$"):
        restore(Reader(saved), whole(targets), targets.keys())
    assert read == []


def test_a_prefix_leaves_other_names_alone(saved: Path) -> None:
    wanted = {name: tensor for name, tensor in crews.many_of(STEP).items() if name.startswith("model/")}
    targets = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    restore(Reader(saved), whole(targets), targets.keys(), prefix="model/")
    assert all(same_bits(targets[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"^checkpoint model/more = nothing: expected a tensor$"):
        restore(Reader(saved), {}, [*targets, "model/more"], prefix="model/")


@pytest.mark.gpu
def test_tensors_on_a_gpu_go_and_come_back(tmp_path: Path, blocks: int) -> None:
    there = {name: tensor.cuda() for name, tensor in crews.many_of(STEP).items()}
    saved = Reader(checkpoint.save(tmp_path, STEP, whole(there), {}))
    targets = {name: torch.zeros_like(tensor) for name, tensor in there.items()}
    restore(saved, whole(targets), targets.keys())
    assert all(same_bits(targets[name], tensor) for name, tensor in crews.many_of(STEP).items())
