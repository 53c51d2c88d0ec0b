"""A model folder in the released layout, checked as a whole before anything of it is read; then any rows of a tensor.

Headers are read as safetensors reads them; of the data only the rows that are asked for, into memory of their size.
Everything wrong is a ValueError that names file or tensor, what was found and what was expected.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.inventory import FileTensor, TensorSpec, released_tensors
from model.names import config_from_keys
from trainer.precision.elements import E2M1_1X32, E4M3_128X128, Format
from trainer.precision.formats import MANTISSA, MANTISSA_BITS, NAN_EXPONENT, Coded, decode, unpack
from trainer.released.layout import QUANTISED, SCALE_TYPES, ScaleType, Slab, Variant, entries, stored, variant_of

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
FORMATS: dict[str, Format] = {"F8_E4M3": E4M3_128X128, "FP4": E2M1_1X32}
TYPES = {
    "F8_E4M3": torch.uint8,
    "F8_E8M0": torch.uint8,
    "I8": torch.uint8,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
}
"""Of what is stored; codes and scales as bytes."""
TINY = 1 << (MANTISSA_BITS - 1)
"""The bits of 2^-127, the one power of two among E8M0's that is no normal number in fp32."""
E4M3_NAN = 127
"""The code of NaN, without its sign."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the bytes of a stored tensor begin."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class ReleasedFolder:
    """The folder at `path`. variant: how it stores its tensors. text, config: its config.json."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError unless names, shapes and types of all tensors are those of config.json's model."""
        self.path = path
        self.text, self.config = read_config(path)
        self._places = _places(path)
        found = variant_of(self.config, {name: place.dtype for name, place in self._places.items()})
        self.variant: Variant = found or "released"  # where there is no expert, that is what the check will say
        self.specs = {spec.name: spec for spec in released_tensors(self.config)}
        self._check()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of config.json, the headers, and sizes and times of the files."""
        files = sorted({place.file for place in self._places.values()})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        found = sorted((name, place.start, place.dtype, place.shape) for name, place in self._places.items())
        return hashlib.sha256(json.dumps([self.text, stats, found]).encode()).hexdigest()

    def scale_type(self, spec: TensorSpec) -> ScaleType:
        """What the scales of a quantised tensor are stored as."""
        return "F32" if self._places[entries(spec, self.variant)[1].name].dtype == "F32" else "F8_E8M0"

    def numbers(self, spec: TensorSpec, slab: Slab, raw: Tensor | None = None) -> Tensor:
        """Rows of a tensor, fp32 (int64 of tid2eid), exactly what is stored. raw: its `stored_rows`, if at hand."""
        kind = stored(spec, self.variant)
        raw = self.stored_rows(spec.name, slab) if raw is None else raw
        if kind == "I64":
            return self._experts(spec, raw, slab)
        if kind not in QUANTISED:
            return self._finite(spec, raw.float(), slab)
        codes = raw
        if kind == "FP4":
            codes, columns = unpack(raw, spec.shape[1]), spec.shape[1]
            if columns % 2:
                self._refuse(spec.name, slab, raw[:, -1:] >> 4 != 0, "a last high nibble", "0, there is no such column")
        else:
            self._refuse(spec.name, slab, (raw & E4M3_NAN) == E4M3_NAN, "the code of NaN", "the code of a number")
        coded = Coded(codes=codes, exponents=self.exponents(spec, slab))
        return self._finite(spec, decode(coded, FORMATS[kind]), slab)

    def exponents(self, spec: TensorSpec, slab: Slab) -> Tensor:
        """The scales of the blocks in these rows, as E8M0. The rows begin with a block's first."""
        rows = FORMATS[stored(spec, self.variant)].block[0]
        assert slab.start % rows == 0, slab
        name = entries(spec, self.variant)[1].name
        blocks = Slab(start=slab.start // rows, stop=-(-slab.stop // rows))
        raw = self.stored_rows(name, blocks)
        if raw.dtype == torch.uint8:
            self._refuse(name, blocks, raw == NAN_EXPONENT, "255, the NaN of E8M0", "a scale, at most 254")
            return raw
        bits = raw.view(torch.int32)
        one = (bits & MANTISSA == 0) & (bits > 0) & (bits < NAN_EXPONENT << MANTISSA_BITS) | (bits == TINY)
        self._refuse(name, blocks, ~one, raw, "a power of two")
        return exponents_of(raw)

    def stored_rows(self, name: str, slab: Slab) -> Tensor:
        """Rows of what is stored under a name; codes and scales of E8M0 as uint8. OSError names the file."""
        place = self._places[name]
        dtype, shape = TYPES[place.dtype], (slab.stop - slab.start, *place.shape[1:])
        row_bytes = math.prod(place.shape[1:]) * dtype.itemsize
        content = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        try:
            with place.file.open("rb") as file:
                file.seek(place.start + slab.start * row_bytes)
                found = file.readinto(content.data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(place.file)) from error
        if found != content.nbytes:
            raise ValueError(f"{place.file} = a shorter file: expected all bytes of {name}")
        return torch.from_numpy(content).view(dtype).view(shape)

    def _finite(self, spec: TensorSpec, values: Tensor, slab: Slab) -> Tensor:
        self._refuse(spec.name, slab, ~values.isfinite(), values, "a finite number in fp32")
        return values

    def _experts(self, spec: TensorSpec, ids: Tensor, slab: Slab) -> Tensor:
        most = self.config.n_routed_experts - 1
        self._refuse(spec.name, slab, (ids < 0) | (ids > most), ids, f"the number of an expert, 0 to {most}")
        return ids

    def _refuse(self, name: str, slab: Slab, wrong: Tensor, found: Tensor | str, expected: str) -> None:
        """ValueError for the first place where `wrong` holds."""
        if not wrong.any():
            return
        at = tuple(int(index) for index in wrong.nonzero()[0])
        value = found if isinstance(found, str) else found[at].item()
        where = f"{name}{[at[0] + slab.start, *at[1:]]}"
        raise ValueError(f"{self._places[name].file}: {where} = {value}: expected {expected}")

    def _check(self) -> None:
        wanted: dict[str, tuple[FileTensor, tuple[str, ...]]] = {}
        for spec in self.specs.values():
            codes, *scales = entries(spec, self.variant)
            wanted[codes.name] = codes, (codes.dtype,)
            wanted |= {scale.name: (scale, SCALE_TYPES[self.variant]) for scale in scales}
        for name, (tensor, dtypes) in wanted.items():
            expected = f"{' or '.join(dtypes)} {list(tensor.shape)}, as a folder of format {self.variant} has it"
            place = self._places.get(name)
            if place is None:
                raise ValueError(f"{self.path}: {name} = nothing: expected {expected}")
            if place.dtype not in dtypes or place.shape != tensor.shape:
                raise ValueError(f"{place.file}: {name} = {place.dtype} {list(place.shape)}: expected {expected}")
        for name in sorted(self._places.keys() - wanted.keys()):
            place = self._places[name]
            found = f"{place.file}: {name} = {place.dtype} {list(place.shape)}"
            raise ValueError(f"{found}: expected no such tensor for this {CONFIG} in format {self.variant}")


def read_config(path: Path) -> tuple[str, ModelConfig]:
    """The config.json of a folder: its text and the model. Raises ValueError naming file or key."""
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"FOLDER = {path}: expected a model's folder with a {CONFIG}")
    try:
        text = file.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{file} = no text: expected JSON ({error})") from error
    return text, parse_config(file, text)


def parse_config(file: Path, text: str) -> ModelConfig:
    """The model of the text of a config.json. Raises ValueError naming file or key."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} = no JSON: expected an object ({error})") from error
    return config_from_keys(file, raw)


def exponents_of(scales: Tensor) -> Tensor:
    """Powers of two, stored as F32 or as the bytes of E8M0, as the latter."""
    if scales.dtype != torch.float32:
        return scales.view(torch.uint8)
    return (scales.view(torch.int32) >> MANTISSA_BITS).to(torch.uint8)


def _places(path: Path) -> dict[str, Place]:
    """By name, where each stored tensor is; the index, where there is one, must say the same."""
    files = [one for one in sorted(path.glob("*.safetensors")) if one.name.startswith(("weights", "model"))]
    index = _index(path)
    for name in sorted(set((index or {}).values()) - {file.name for file in files}):
        found = "another name" if (path / name).exists() else "nothing"
        expected = f"a file model*.safetensors or weights*.safetensors, which {INDEX} names"
        raise ValueError(f"{path / name} = {found}: expected {expected}")
    if not files:
        raise ValueError(f"FOLDER = {path}: expected model*.safetensors or weights*.safetensors in it")
    places: dict[str, Place] = {}
    for file in files:
        for name, place in _header(file):
            if name in places:
                raise ValueError(
                    f"{file}: {name} = a second one: expected one, there is one in {places[name].file.name}"
                )
            places[name] = place
    if index is None:
        return places
    for name in sorted(places.keys() ^ index.keys()):
        there = places[name].file.name if name in places else "nothing"
        raise ValueError(
            f"{path / INDEX}: {name} = {index.get(name, 'nothing')}: expected {there}, as the files have it"
        )
    for name, file_name in index.items():
        if places[name].file.name != file_name:
            raise ValueError(f"{path / INDEX}: {name} = {file_name}: expected {places[name].file.name}, where it is")
    return places


def _index(path: Path) -> dict[str, str] | None:
    if not (path / INDEX).exists():
        return None
    try:
        return {str(name): str(file) for name, file in json.loads((path / INDEX).read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"{path / INDEX} = no index: expected a weight_map of names to files ({error})") from error


def _header(path: Path) -> Iterator[tuple[str, Place]]:
    try:
        with path.open("rb") as file:
            with safe_open(path, framework="np"):  # refuses what is truncated, overlaps or has bytes of no tensor
                pass
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        found = f"{path.stat().st_size} bytes" if path.exists() else "nothing"
        raise ValueError(f"{path} = {found}: expected a whole safetensors file ({error})") from error
    for name, entry in header.items():
        if name != "__metadata__":
            start = 8 + length + entry["data_offsets"][0]
            yield name, Place(file=path, start=start, dtype=entry["dtype"], shape=tuple(entry["shape"]))
