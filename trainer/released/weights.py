"""The fp32 weights of a checkpoint or an import, any rows of a released tensor; and the scales an import has kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.inventory import TensorSpec, released_tensors
from model.logical import locate
from trainer.manifest import COMMIT, CheckpointError
from trainer.reader import Reader
from trainer.released.imported import KIND, scales_name
from trainer.released.layout import ScaleType, Slab, Variant, slabs, stored
from trainer.released.source import FORMATS, ReleasedFolder, exponents_of, parse_config


class Kept(Protocol):
    """Where scales come from that a tensor was once stored by: an import, or a released folder.

    text, config: its config.json.
    """

    variant: Variant
    text: str
    config: ModelConfig

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides its scales."""
        ...

    def scale_type(self, spec: TensorSpec) -> ScaleType:
        """What the scales of a quantised tensor are stored as."""
        ...

    def exponents(self, spec: TensorSpec, slab: Slab) -> Tensor:
        """The scales of the blocks in these rows, as E8M0."""
        ...


class Imported:
    """What `run_import` made. text, config: the config.json it came with."""

    def __init__(self, reader: Reader) -> None:
        """Raises ValueError where the checkpoint is no import."""
        about = reader.state.get(KIND)
        if not isinstance(about, dict):
            raise ValueError(f"FOLDER = {reader.path}: expected what keel import made, or a released folder")
        self._reader = reader
        self.variant: Variant = about["format"]
        self.text = about["config"]
        self.config = parse_config(reader.path / "config.json", self.text)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest."""
        return (self._reader.path / COMMIT).read_text().strip()

    def scale_type(self, spec: TensorSpec) -> ScaleType:
        """What the scales of a quantised tensor are stored as."""
        name = scales_name(spec, stored(spec, self.variant))
        return "F32" if self._reader.dtype(name) == torch.float32 else "F8_E8M0"

    def exponents(self, spec: TensorSpec, slab: Slab) -> Tensor:
        """The scales of the blocks in these rows, as E8M0."""
        kind = stored(spec, self.variant)
        rows = FORMATS[kind].block[0]
        try:
            return exponents_of(self._reader.rows(scales_name(spec, kind), slab.start // rows, -(-slab.stop // rows)))
        except CheckpointError as error:
            raise _damaged(self._reader.path, error) from error


class Weights:
    """The masters of a checkpoint where it has them, else its weights, for a model of this configuration."""

    def __init__(self, reader: Reader, config: ModelConfig) -> None:
        """Raises ValueError naming the tensor unless all are there in the shapes of the model."""
        self._reader = reader
        self.specs = tuple(released_tensors(config))
        for spec in self.specs:
            name, index = self._place(spec)
            found = reader.shape(name) if name in reader.manifest.tensors else None
            wanted = spec.shape if index is None else (config.n_routed_experts, *spec.shape)
            if found != wanted:
                there = "nothing" if found is None else list(found)
                raise ValueError(f"{reader.path}: {name} = {there}: expected a tensor {list(wanted)}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest."""
        return (self._reader.path / COMMIT).read_text().strip()

    def slabs(self, spec: TensorSpec) -> Iterator[tuple[Slab, Tensor]]:
        """All rows of a released tensor in order, fp32, fp64 of such a run, int64 of tid2eid; an expert's at once."""
        name, index = self._place(spec)
        expert = None if index is None else self._reader.rows(name, index, index + 1)[0]
        for slab in slabs(spec):
            rows = self._reader.rows(name, slab.start, slab.stop) if expert is None else expert[slab.start : slab.stop]
            kept = rows.dtype in (torch.int64, torch.float64)
            yield slab, self._finite(name, rows if kept else rows.float(), slab)

    def _place(self, spec: TensorSpec) -> tuple[str, int | None]:
        where = locate(spec.name)
        master = f"optimizer/master/{where.parameter}"
        return master if master in self._reader.manifest.tensors else f"model/{where.parameter}", where.index

    def _finite(self, name: str, rows: Tensor, slab: Slab) -> Tensor:
        wrong = ~rows.to(torch.int64 if rows.dtype == torch.int64 else torch.float32).isfinite()
        if wrong.any():
            at = tuple(int(index) for index in wrong.nonzero()[0])
            where = f"{name}{[at[0] + slab.start, *at[1:]]}"
            raise ValueError(f"{self._reader.path}: {where} = {rows[at].item()}: expected a finite number in fp32")
        return rows


def find_kept(path: Path) -> "Imported | ReleasedFolder":
    """The scales of an import or of a released folder; raises ValueError where it is neither."""
    if not (path / COMMIT).is_file():
        return ReleasedFolder(path)
    try:
        return Imported(Reader(path))
    except CheckpointError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: CheckpointError) -> ValueError:
    return ValueError(f"--like = {path}: expected scales that verify: {error}")
