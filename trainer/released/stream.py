"""A safetensors file written piece by piece: never more of it in memory than the piece, hashed as it goes."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import durable
from trainer.manifest import BLOCK_BYTES
from trainer.released.memory import give_back

_LENGTH_BYTES = 8
_ALIGNMENT = 8
"""A header is filled up with spaces, so that numbers of eight bytes begin where processors like them."""

GIVE_BACK_SIZE = 1 << 22
"""After how many written numbers freed memory goes back to the system (ours): two slabs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of a file: its name there, its type as safetensors calls it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    element_bytes: int

    @property
    def size_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A tensor in a file that is on the disk: bytes `start` to `stop`, SHA-256 of all and of each block of them."""

    start: int
    stop: int
    sha256: str
    hashes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file that is on the disk, to the last byte as it was written where the hashes say so."""

    name: str
    size_bytes: int
    header_bytes: int
    header_hash: str
    tensors: dict[str, Written]


class Stream:
    """Writes `path`: each entry in parts, in their order; entries in any order, side by side."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._path = path
        # The widest numbers first: each tensor begins at a multiple of its numbers' size.
        ordered = sorted(entries, key=lambda entry: -entry.element_bytes)
        table, at = {}, 0
        for entry in ordered:
            table[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [at, at + entry.size_bytes],
            }
            at += entry.size_bytes
        content = json.dumps(table, separators=(",", ":")).encode()
        content += b" " * (-len(content) % _ALIGNMENT)
        self._header = len(content).to_bytes(_LENGTH_BYTES, "little") + content
        self.size_bytes = len(self._header) + at
        self._parts = {name: _Part(len(self._header), *one["data_offsets"]) for name, one in table.items()}
        self._since = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write(0, memoryview(self._header))

    def append(self, name: str, tensor: Tensor) -> None:
        """The next bytes of an entry; raises OSError."""
        part, content = self._parts[name], memoryview(_bytes(tensor).data)
        self._write(part.take(content), content)
        self._since += tensor.numel()
        if self._since >= GIVE_BACK_SIZE:
            give_back()
            self._since = 0

    def close(self) -> WrittenFile:
        """Syncs, once all entries are whole."""
        short = [name for name, part in self._parts.items() if not part.is_whole]
        assert not short, short
        os.fsync(self._file)
        self.abandon()
        durable.sync(self._path.parent)
        return WrittenFile(
            name=self._path.name,
            size_bytes=self.size_bytes,
            header_bytes=len(self._header),
            header_hash=hashlib.sha256(self._header).hexdigest(),
            tensors={name: part.written() for name, part in self._parts.items()},
        )

    def abandon(self) -> None:
        """Closes the file as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, start: int, content: memoryview) -> None:
        while content.nbytes:
            done = os.pwrite(self._file, content, start)
            start, content = start + done, content[done:]


class _Part:
    """Where the next bytes of an entry go, and the hashes of those that went before."""

    def __init__(self, header_bytes: int, start: int, stop: int) -> None:
        self._start = self._at = header_bytes + start
        self._stop = header_bytes + stop
        self._whole, self._block, self._in_block = hashlib.sha256(), hashlib.sha256(), 0
        self._hashes: list[str] = []

    @property
    def is_whole(self) -> bool:
        return self._at == self._stop

    def take(self, content: memoryview) -> int:
        """Hash what comes next; returns where it belongs."""
        assert self._at + content.nbytes <= self._stop, "more bytes than the entry has"
        at = self._at
        self._at += content.nbytes
        self._whole.update(content)
        while content.nbytes:
            now = content[: BLOCK_BYTES - self._in_block]
            self._block.update(now)
            self._in_block += now.nbytes
            content = content[now.nbytes :]
            if self._in_block == BLOCK_BYTES:
                self._end_block()
        return at

    def written(self) -> Written:
        if self._in_block:
            self._end_block()
        hashes = tuple(self._hashes)
        return Written(start=self._start, stop=self._stop, sha256=self._whole.hexdigest(), hashes=hashes)

    def _end_block(self) -> None:
        self._hashes.append(self._block.hexdigest())
        self._block, self._in_block = hashlib.sha256(), 0


def is_intact(path: Path, written: WrittenFile) -> bool:
    """Whether every byte of the file is as it was written."""
    if not path.is_file() or path.stat().st_size != written.size_bytes:
        return False
    with path.open("rb") as file:
        if hashlib.sha256(file.read(written.header_bytes)).hexdigest() != written.header_hash:
            return False
        for tensor in sorted(written.tensors.values(), key=lambda one: one.start):
            found = (hashlib.sha256(block).hexdigest() for block in _blocks(file, tensor))
            if tuple(found) != tensor.hashes:
                return False
    return True


def as_written(row: dict[str, Any]) -> WrittenFile:
    """What `dataclasses.asdict` made of one."""
    tensors = {name: Written(**one | {"hashes": tuple(one["hashes"])}) for name, one in row["tensors"].items()}
    return WrittenFile(**row | {"tensors": tensors})


def _blocks(file: Any, tensor: Written) -> Iterator[bytes]:
    file.seek(tensor.start)
    for start in range(tensor.start, tensor.stop, BLOCK_BYTES):
        yield file.read(min(BLOCK_BYTES, tensor.stop - start))


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
