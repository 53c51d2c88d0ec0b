"""From a released folder to one in the layout of Keel's checkpoints: fp32 weights, and the scales they were stored by.

    OUT/rank-00000.safetensors ...   model/NAME in fp32 (experts stacked), scales/FORMAT/NAME as they were stored
    OUT/manifest.json  OUT/COMMIT    as every checkpoint's; its state has config.json and the format
    OUT/report.jsonl                 a line for each tensor

The weights are exactly what the codes say. With the scales each code can be made again from its number, so that what
nothing has changed can be exported byte by byte.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from model.inventory import TensorSpec
from model.logical import locate
from trainer import durable
from trainer.manifest import (
    COMMIT,
    MANIFEST,
    FileEntry,
    Manifest,
    PieceEntry,
    TensorEntry,
    commit_of,
    count_rows,
    data_file,
    key,
)
from trainer.released import job
from trainer.released.layout import QUANTISED, Slab, entries, slabs, stored
from trainer.released.source import FORMATS, ReleasedFolder
from trainer.released.stream import Entry, Stream

FILE_BYTES = 4 << 30
"""Most bytes of a file of an import (ours)."""
KIND = "import"
REPORT = "report.jsonl"
TYPES = {"I64": "int64", "F32": "float32", "F8_E8M0": "float8_e8m0fnu"}
"""What the manifest calls the types of safetensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of a tensor of the checkpoint: `start` to `stop` of `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    entry: Entry


def scales_name(spec: TensorSpec, kind: str) -> str:
    """The name of the scales of a tensor in an import. kind: F8_E4M3 or FP4."""
    return f"scales/{FORMATS[kind].name}/{spec.name}"


def run_import(folder: ReleasedFolder, out: Path, say: job.Say, file_bytes: int = FILE_BYTES) -> tuple[job.Row, ...]:
    """Write `out` and return the rows of the report; goes on where it was broken off. Raises ValueError.

    In memory at a time: a slab of a tensor (`layout.SLAB_SIZE`), and what its conversion takes.
    """
    rows = {spec.name: _rows(folder, spec) for spec in folder.specs.values()}
    items = [_item(folder, spec, rows[spec.name]) for spec in folder.specs.values()]
    shared = job.share_out(items, file_bytes)
    files = {data_file(number): items for number, items in enumerate(shared)}
    what = {"import": folder.fingerprint, "file_bytes": file_bytes}

    def finish(working: Path, done: job.Done) -> None:
        every = [row for of_tensor in rows.values() for row in of_tensor]
        content = _manifest(folder, every, done).encode()
        write_report(working, done)
        durable.write(working / MANIFEST, content)
        durable.write(working / COMMIT, commit_of(content))

    return job.make(out, what, files, finish, say).rows


def write_report(working: Path, done: job.Done) -> None:
    """One line of JSON for each row."""
    durable.write(working / REPORT, "".join(f"{json.dumps(row)}\n" for row in done.rows).encode())


def _rows(folder: ReleasedFolder, spec: TensorSpec) -> tuple[Row, ...]:
    """What the checkpoint has of a tensor: its numbers, and its scales where it has some."""
    where, kind = locate(spec.name), stored(spec, folder.variant)
    shape = spec.shape if where.index is None else (folder.config.n_routed_experts, *spec.shape)
    first, stop = (0, count_rows(shape)) if where.index is None else (where.index, where.index + 1)
    dtype, size = ("I64", 8) if kind == "I64" else ("F32", 4)
    numbers = _row(f"model/{where.parameter}", shape, first, stop, dtype, size)
    if kind not in QUANTISED:
        return (numbers,)
    scales = entries(spec, folder.variant, folder.scale_type(spec))[1]
    return numbers, _row(scales_name(spec, kind), scales.shape, 0, scales.shape[0], scales.dtype, scales.element_bytes)


def _row(name: str, shape: tuple[int, ...], start: int, stop: int, dtype: str, size: int) -> Row:
    entry = Entry(name=key(name, shape, start, stop), dtype=dtype, shape=(stop - start, *shape[1:]), element_bytes=size)
    return Row(name=name, shape=shape, start=start, stop=stop, entry=entry)


def _item(folder: ReleasedFolder, spec: TensorSpec, rows: tuple[Row, ...]) -> job.Item:
    def write(stream: Stream) -> job.Row:
        amax, codes_hash = 0.0, hashlib.sha256()
        for slab in slabs(spec):
            raw = folder.stored_rows(spec.name, slab)
            numbers = folder.numbers(spec, slab, raw)
            stream.append(rows[0].entry.name, numbers)
            codes_hash.update(raw.reshape(-1).view(torch.uint8).numpy().data)
            amax = max(amax, float(numbers.abs().max()))
        codes = entries(spec, folder.variant)[0]
        row = {"name": spec.name, "shape": list(spec.shape), "stored": codes.dtype, "amax": amax}
        row |= {"sha256": codes_hash.hexdigest()}
        if len(rows) == 1:
            return row
        scales = entries(spec, folder.variant, folder.scale_type(spec))[1]
        raw = folder.stored_rows(scales.name, Slab(start=0, stop=scales.shape[0]))
        stream.append(rows[1].entry.name, raw)
        return row | {"scales": scales.dtype, "distinct_scales": len(raw.unique())}

    return job.Item(entries=tuple(row.entry for row in rows), write=write)


def _manifest(folder: ReleasedFolder, rows: list[Row], done: job.Done) -> Manifest:
    """The checkpoint's table of contents; the import is of step 0."""
    found = {name: (file.name, one) for file in done.files for name, one in file.tensors.items()}
    pieces: dict[str, list[PieceEntry]] = {}
    for row in rows:
        file, one = found[row.entry.name]
        piece = PieceEntry(
            file=file, start_row=row.start, stop_row=row.stop, start=one.start, stop=one.stop, hashes=one.hashes
        )
        pieces.setdefault(row.name, []).append(piece)
    kinds = {row.name: (TYPES[row.entry.dtype], row.shape) for row in rows}
    return Manifest(
        step=0,
        files={
            file.name: FileEntry(
                size_bytes=file.size_bytes, header_bytes=file.header_bytes, header_hash=file.header_hash
            )
            for file in done.files
        },
        tensors={
            name: TensorEntry(
                dtype=dtype, shape=shape, pieces=tuple(sorted(pieces[name], key=lambda one: one.start_row))
            )
            for name, (dtype, shape) in kinds.items()
        },
        state={KIND: {"format": folder.variant, "config": folder.text}},
    )
