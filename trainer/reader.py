"""Reading a checkpoint: any rows of any tensor, whoever wrote them; the bytes that are verified are those returned.

Only the blocks that hold the rows are read, and each is compared with its hash before anything of it counts.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.manifest import (
    BLOCK_BYTES,
    COMMIT,
    DTYPES,
    MANIFEST,
    CheckpointError,
    FileEntry,
    Manifest,
    PieceEntry,
    commit_of,
    count_rows,
    decode,
    digest,
    key,
    step_of,
)
from trainer.pieces import Piece


class Reader:
    """A committed checkpoint. Raises CheckpointError, with file, tensor and bytes, where anything is not as written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._checked: set[str] = set()

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """The JSON object that was saved with the tensors."""
        return self.manifest.state

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, in the order in which they were saved."""
        return tuple(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.manifest.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor."""
        return DTYPES[self.manifest.tensors[name].dtype]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` on the CPU; a tensor without dimensions is one row, and comes back as it was.

        In memory from torch, because its alignment can decide which code path, and so which bits, a later product
        takes.
        """
        shape = self.shape(name)
        tensor = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=self.dtype(name))
        self.fill(name, start, tensor)
        return tensor

    def whole(self, name: str) -> Tensor:
        """All rows."""
        return self.rows(name, 0, count_rows(self.shape(name)))

    def fill(self, name: str, start: int, target: Tensor) -> None:
        """Read the rows from `start` on into `target`, on any device, which has their shape and dtype.

        Holds one block beside it. After an error the target is partly written.
        """
        entry, stop = self.manifest.tensors[name], start + count_rows(target.shape)
        assert 0 <= start <= stop <= count_rows(entry.shape), f"{name}[{start}:{stop}] of {entry.shape}"
        assert (target.dtype, tuple(target.shape[1:])) == (DTYPES[entry.dtype], entry.shape[1:]), (
            f"another kind: {name}"
        )
        if not target.is_contiguous():
            target.detach().copy_(self.rows(name, start, stop))
            return
        bytes_P = target.detach().reshape(-1).view(torch.uint8)
        row_bytes = bytes_P.numel() // max(stop - start, 1)
        for piece in entry.pieces:
            low, high = max(piece.start_row, start), min(piece.stop_row, stop)
            if low < high and row_bytes > 0:
                begin, end = ((row - start) * row_bytes for row in (low, high))
                self._read(name, piece, (low - piece.start_row) * row_bytes, bytes_P[begin:end])

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Read this rank's share of all blocks and of the files' headers; the shares of `size` ranks are the whole."""
        self.verify_headers(rank, size)
        total = sum(len(piece.hashes) for entry in self.manifest.tensors.values() for piece in entry.pieces)
        mine = itertools.islice(self._blocks(), total * rank // size, total * (rank + 1) // size)
        scratch = torch.empty(BLOCK_BYTES, dtype=torch.uint8).numpy()
        for file_name, blocks in itertools.groupby(mine, key=lambda block: block[1].file):
            with self._open(file_name) as file:
                for name, piece, number in blocks:
                    self._read_block(file, name, piece, number, scratch)

    def verify_headers(self, rank: int = 0, size: int = 1) -> None:
        """Compare this rank's share of the files with their sizes and the hashes of their headers."""
        for name in sorted(self.manifest.files)[rank::size]:
            with self._open(name):
                pass

    def _blocks(self) -> Iterator[tuple[str, PieceEntry, int]]:
        """Every block of every file, in the order of the disk."""
        tensors = self.manifest.tensors.items()
        pieces = [(piece.file, piece.start, name, piece) for name, entry in tensors for piece in entry.pieces]
        for _, _, name, piece in sorted(pieces, key=lambda of: of[:2]):
            for number in range(len(piece.hashes)):
                yield name, piece, number

    def _read(self, name: str, piece: PieceEntry, low: int, bytes_P: Tensor) -> None:
        """Read the piece's bytes from `low` on; whole blocks go straight into memory of the CPU."""
        high, size = low + bytes_P.numel(), piece.stop - piece.start
        scratch_P = torch.empty(min(BLOCK_BYTES, size), dtype=torch.uint8)
        with self._open(piece.file) as file:
            for number in range(low // BLOCK_BYTES, -(-high // BLOCK_BYTES)):
                first, last = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, size)
                begin, end = max(first, low), min(last, high)
                part_P = bytes_P[begin - low : end - low]
                if (begin, end) == (first, last) and part_P.device.type == "cpu":
                    self._read_block(file, name, piece, number, part_P.numpy())
                else:
                    self._read_block(file, name, piece, number, scratch_P.numpy())
                    part_P.copy_(scratch_P[begin - first : end - first])

    def _read_block(self, file: BufferedReader, name: str, piece: PieceEntry, number: int, into: np.ndarray) -> None:
        """Read one block into the beginning of `into` and verify it there."""
        first = piece.start + number * BLOCK_BYTES
        last = min(first + BLOCK_BYTES, piece.stop)
        block = into[: last - first]
        file.seek(first)
        found = digest(block[: file.readinto(block.data)])
        if found != piece.hashes[number]:
            which = key(name, self.shape(name), piece.start_row, piece.stop_row)
            where = f"{self.path / piece.file}: tensor {which}, bytes {first} to {last}"
            raise CheckpointError(f"{where}: SHA-256 is {found}, the manifest says {piece.hashes[number]}")

    @contextmanager
    def _open(self, name: str) -> Iterator[BufferedReader]:
        """A file, its size and header verified when it is opened first; OSError becomes CheckpointError."""
        path = self.path / name
        try:
            with path.open("rb") as file:
                if name not in self._checked:
                    _check_header(file, path, self.manifest.files[name])
                    self._checked.add(name)
                yield file
        except OSError as error:
            raise CheckpointError(f"{path}: {error}") from error


def read_manifest(path: Path) -> Manifest:
    """The manifest of a committed checkpoint, without its tensors; raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        commit, content = (path / COMMIT).read_bytes(), (path / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error
    if commit != commit_of(content):
        found = commit[:64].decode(errors="replace").strip()
        raise CheckpointError(f"{path / MANIFEST}: has SHA-256 {digest(content)}, but COMMIT says {found!r}")
    manifest = decode(content)
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"{path}: is a checkpoint of step {manifest.step}")
    return manifest


def restore(
    reader: Reader, targets: Mapping[str, Sequence[Piece]], expected: Collection[str], *, prefix: str = ""
) -> None:
    """Read what each target holds into its tensor, one after the other.

    expected: the names that the checkpoint must have, of those that begin with `prefix`: no more, no fewer. Raises
    ValueError, nothing read, unless they are and the targets' shapes and dtypes are the checkpoint's.
    """
    found = {name for name in reader.names if name.startswith(prefix)}
    for name in sorted(found ^ set(expected)):
        there, wanted = ("nothing", "a tensor") if name in expected else ("a tensor", "none of this name")
        raise ValueError(f"checkpoint {name} = {there}: expected {wanted}")
    for name, pieces in targets.items():
        saved = _described(reader.dtype(name), reader.shape(name))
        for piece in pieces:
            wanted = _described(piece.tensor.dtype, piece.shape)
            if saved != wanted:
                raise ValueError(f"checkpoint {name} = {saved}: expected {wanted}")
    for name, pieces in targets.items():
        for piece in pieces:
            reader.fill(name, piece.start, piece.tensor)


def _described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _check_header(file: BufferedReader, path: Path, entry: FileEntry) -> None:
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise CheckpointError(f"{path}: has {size} bytes, the manifest says {entry.size_bytes}")
    found = digest(file.read(entry.header_bytes))
    if found != entry.header_hash:
        raise CheckpointError(f"{path}: header has SHA-256 {found}, the manifest says {entry.header_hash}")
