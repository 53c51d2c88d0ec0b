"""The file of one rank: its pieces as an ordinary safetensors file, and what the manifest says of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file

from trainer import durable
from trainer.manifest import (
    BLOCK_BYTES,
    FileEntry,
    Manifest,
    PieceEntry,
    TensorEntry,
    digest,
    key,
)
from trainer.pieces import Outline, Pieces, byte_view, dtype_name

_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, a little-endian 64-bit integer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A file that is on the disk: its name, its entry in the manifest, and those of its pieces by tensor."""

    name: str
    file: FileEntry
    pieces: dict[str, tuple[PieceEntry, ...]]


def write(path: Path, pieces: Pieces) -> Shard:
    """Write and sync the pieces, which `pieces.outline` has passed; raises OSError or SafetensorError."""
    named = {
        key(name, piece.shape, piece.start, piece.stop): (name, piece)
        for name, parts in pieces.items()
        for piece in parts
    }
    views = {of_piece: byte_view(name, piece.tensor) for of_piece, (name, piece) in named.items()}
    specs = {
        of_piece: TensorSpec(
            dtype=dtype_name(piece.tensor),
            shape=piece.tensor.shape,
            data_ptr=views[of_piece].ctypes.data,
            data_len=views[of_piece].nbytes,
        )
        for of_piece, (_, piece) in named.items()
    }
    serialize_file(specs, path)
    durable.sync(path)
    file, starts = _read_header(path)
    entries: dict[str, list[PieceEntry]] = {}
    for of_piece, (name, piece) in named.items():
        start, view = starts[of_piece], views[of_piece]
        entry = PieceEntry(
            file=path.name, start_row=piece.start, stop_row=piece.stop, start=start, stop=start + view.nbytes,
            hashes=tuple(map(digest, _blocks(view))),
        )  # fmt: skip
        entries.setdefault(name, []).append(entry)
    return Shard(name=path.name, file=file, pieces={name: tuple(parts) for name, parts in entries.items()})


def merge(
    step: int, of_ranks: Sequence[Mapping[str, Outline]], shards: Sequence[Shard | None], state: dict[str, Any]
) -> Manifest:
    """The manifest of all ranks' files; tensors in the order in which the first rank that has one of them gave it."""
    outlines: dict[str, Outline] = {}
    for mine in of_ranks:
        for name, outlined in mine.items():
            outlines.setdefault(name, outlined)
    written = [shard for shard in shards if shard is not None]
    pieces: dict[str, list[PieceEntry]] = {name: [] for name in outlines}
    for shard in written:
        for name, parts in shard.pieces.items():
            pieces[name].extend(parts)
    return Manifest(
        step=step,
        files={shard.name: shard.file for shard in written},
        tensors={
            name: TensorEntry(
                dtype=outlined.dtype,
                shape=outlined.shape,
                pieces=tuple(sorted(pieces[name], key=lambda piece: piece.start_row)),
            )
            for name, outlined in outlines.items()
        },
        state=state,
    )


def _blocks(view: np.ndarray) -> list[np.ndarray]:
    return [view[start : start + BLOCK_BYTES] for start in range(0, view.nbytes, BLOCK_BYTES)]


def _read_header(path: Path) -> tuple[FileEntry, dict[str, int]]:
    """The file's entry in the manifest, and the position of each piece's first byte in the file."""
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        header = file.read(int.from_bytes(length, "little"))
    size = _LENGTH_BYTES + len(header)
    entry = FileEntry(size_bytes=path.stat().st_size, header_bytes=size, header_hash=digest(length + header))
    return entry, {name: size + value["data_offsets"][0] for name, value in json.loads(header).items()}
