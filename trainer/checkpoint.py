"""Checkpoints: a folder of safetensors and a manifest, complete when `COMMIT` is there, verified whenever it is read.

    checkpoints/step-000600/rank-00000.safetensors   the tensors; any safetensors reader opens it
    checkpoints/step-000600/manifest.json            where each tensor is, hash per block, the run's state (manifest.py)
    checkpoints/step-000600/COMMIT                   SHA-256 of the manifest, written last

Saving writes a folder `.writing-step-000600` beside, syncs each file, renames the folder and then writes COMMIT, so a
crash leaves a folder that does not count. Nothing is overwritten: a folder in the way, like a damaged one, is renamed
`step-000600.set-aside-1` and stays until somebody deletes it. Reading never changes anything; only `recover` does.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, TensorSpec, serialize_file
from torch import Tensor

from trainer import durable
from trainer.manifest import (
    BLOCK_BYTES,
    DTYPES,
    CheckpointError,
    FileEntry,
    Manifest,
    TensorEntry,
    checked_state,
    decode,
    digest,
)

COMMIT, MANIFEST, DATA = "COMMIT", "manifest.json", "rank-00000.safetensors"
_STEP_NAME = re.compile(r"step-(\d{6,})")
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, a little-endian 64-bit integer."""
_RESERVED = "__metadata__"
"""The one name that a safetensors header keeps for itself."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loaded:
    """A verified checkpoint: tensors on the CPU in the order they were saved in, and the run's state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes one checkpoint durably and returns its folder; any dtype of `manifest.DTYPES`, any shape and device.

    Raises CheckpointError when it cannot be written (full disk, ...): then no folder with COMMIT appears and all
    checkpoints that were there are as before.
    """
    assert step >= 0, "folders are named by the step"
    if _RESERVED in tensors:
        raise CheckpointError(f"tensor {_RESERVED}: expected another name, safetensors keeps this one for itself")
    checked = checked_state(state)
    views = {name: byte_view(name, tensor) for name, tensor in tensors.items()}
    target = folder / f"step-{step:06d}"
    working = folder / f".writing-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        commit = _write_files(working, step, tensors, views, checked)
        _publish(working, target, commit)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(working, ignore_errors=True)
        raise CheckpointError(f"{target}: not saved: {error}") from error
    return target


def load(path: Path) -> Loaded:
    """Reads and verifies every byte of the checkpoint at `path`.

    Raises CheckpointError with the file, the tensor and what was found where anything is missing or differs.
    """
    manifest = read_manifest(path)
    tensors: dict[str, Tensor] = {}
    try:
        for file_name, entry in manifest.files.items():
            with (path / file_name).open("rb") as file:
                _check_header(file, path / file_name, entry)
                for name, tensor in manifest.tensors.items():
                    if tensor.file == file_name:
                        tensors[name] = _read_tensor(file, path / file_name, name, tensor)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Loaded(step=manifest.step, tensors=tensors, state=manifest.state)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a committed checkpoint, without its tensors; raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        commit, content = (path / COMMIT).read_bytes(), (path / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error
    if commit != _commit(content):
        found = commit[:64].decode(errors="replace").strip()
        raise CheckpointError(f"{path / MANIFEST}: has SHA-256 {digest(content)}, but COMMIT says {found!r}")
    manifest = decode(content)
    name = _STEP_NAME.fullmatch(path.name)
    if name and int(name[1]) != manifest.step:
        raise CheckpointError(f"{path}: is a checkpoint of step {manifest.step}")
    return manifest


def newest_valid(folder: Path, report: Callable[[str], None]) -> tuple[Path, Loaded] | None:
    """The newest checkpoint that verifies, or None; one line of report for each that does not. Changes nothing."""
    return _search(folder, lambda path, error: report(f"checkpoint {path.name} cannot be used: {error}"))


def recover(folder: Path, report: Callable[[str], None]) -> tuple[Path, Loaded] | None:
    """`newest_valid` for the process that will write here: what cannot be used is set aside and never counts."""

    def reject(path: Path, error: CheckpointError) -> None:
        aside = set_aside(path)
        report(f"checkpoint {path.name} cannot be used and is now {aside.name}: {error}")

    return _search(folder, reject)


def steps(folder: Path) -> dict[int, Path]:
    """All folders named like a checkpoint, in ascending order of step, valid or not."""
    if not folder.is_dir():
        return {}
    found = ((_STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(name[1]), path) for name, path in found if name))


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


def byte_view(name: str, tensor: Tensor) -> np.ndarray:
    """The tensor's bytes, uint8 [n], without a copy where it is contiguous on the CPU; raises CheckpointError."""
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(f"tensor {name}: {tensor.dtype} cannot be saved, expected one of {', '.join(DTYPES)}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _search(folder: Path, reject: Callable[[Path, CheckpointError], None]) -> tuple[Path, Loaded] | None:
    for path in reversed(steps(folder).values()):
        try:
            return path, load(path)
        except CheckpointError as error:
            reject(path, error)
    return None


def _write_files(
    working: Path, step: int, tensors: Mapping[str, Tensor], views: Mapping[str, np.ndarray], state: dict[str, Any]
) -> bytes:
    """Writes and syncs the data and the manifest; returns what COMMIT must contain."""
    data = working / DATA
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(dtype=dtypes[name], shape=tensor.shape, data_ptr=view.ctypes.data, data_len=view.nbytes)
        for (name, tensor), view in zip(tensors.items(), views.values(), strict=True)
    }
    serialize_file(specs, data)
    durable.sync(data)
    file, starts = _read_header(data)
    entries = {
        name: TensorEntry(
            file=DATA, dtype=dtypes[name], shape=tuple(tensor.shape), start=starts[name],
            stop=starts[name] + views[name].nbytes, hashes=tuple(map(digest, _blocks(views[name]))),
        )
        for name, tensor in tensors.items()
    }  # fmt: skip
    content = Manifest(step=step, files={DATA: file}, tensors=entries, state=state).encode()
    decode(content)
    durable.write(working / MANIFEST, content)
    return _commit(content)


def _publish(working: Path, target: Path, commit: bytes) -> None:
    """Gives the folder its name and commits it; on failure everything is as before."""
    displaced = set_aside(target) if target.exists() else None
    try:
        working.rename(target)
        durable.sync(target.parent)
        durable.write(target / COMMIT, commit)
    except OSError:
        shutil.rmtree(working if working.exists() else target, ignore_errors=True)
        if displaced is not None:
            displaced.rename(target)
        raise


def _commit(manifest: bytes) -> bytes:
    return f"{digest(manifest)}\n".encode()


def _blocks(view: np.ndarray) -> list[np.ndarray]:
    return [view[start : start + BLOCK_BYTES] for start in range(0, view.nbytes, BLOCK_BYTES)]


def _read_header(path: Path) -> tuple[FileEntry, dict[str, int]]:
    """The file's entry in the manifest, and the position of each tensor's first byte in the file."""
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        header = file.read(int.from_bytes(length, "little"))
    size = _LENGTH_BYTES + len(header)
    entry = FileEntry(size_bytes=path.stat().st_size, header_bytes=size, header_hash=digest(length + header))
    return entry, {name: size + value["data_offsets"][0] for name, value in json.loads(header).items()}


def _check_header(file: BufferedReader, path: Path, entry: FileEntry) -> None:
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise CheckpointError(f"{path}: has {size} bytes, the manifest says {entry.size_bytes}")
    found = digest(file.read(entry.header_bytes))
    if found != entry.header_hash:
        raise CheckpointError(f"{path}: header has SHA-256 {found}, the manifest says {entry.header_hash}")


def _read_tensor(file: BufferedReader, path: Path, name: str, entry: TensorEntry) -> Tensor:
    """Reads one tensor into memory of its own, so that the bytes that were verified are the bytes returned.

    Memory from torch, because its alignment can decide which code path, and so which bits, a later product takes.
    """
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    file.seek(entry.start)
    for number, (block, expected) in enumerate(zip(_blocks(byte_view(name, tensor)), entry.hashes, strict=True)):
        read = file.readinto(block.data)
        found = digest(block[:read])
        if found != expected:
            first = entry.start + number * BLOCK_BYTES
            where = f"tensor {name}, bytes {first} to {first + len(block)}"
            raise CheckpointError(f"{path}: {where}: SHA-256 is {found}, the manifest says {expected}")
    return tensor
