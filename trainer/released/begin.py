"""A run that begins at given weights, an import's or another run's: fp32 masters where there are some, no optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model import names
from model.config import InitConfig
from model.inventory import released_tensors
from model.logical import locate, parameter_shapes
from model.transformer import Transformer
from trainer.manifest import COMMIT, CheckpointError
from trainer.reader import Reader
from trainer.released.imported import KIND
from trainer.released.keys import first_difference
from trainer.released.layout import SLAB_SIZE
from trainer.released.source import parse_config

KEY = "init.weights"


def facts(init: InitConfig) -> dict[str, str]:
    """What a run keeps of the weights that it begins at: a SHA-256 that stands for all of them."""
    return {"init_weights": (_open(init.weights).path / COMMIT).read_text().strip()} if init.weights else {}


def require_same(init: InitConfig, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where a run begins anew and its weights are not what it began at. saved: its provenance."""
    if facts(init).get("init_weights") != saved.get("init_weights"):
        raise ValueError(f"{KEY} = {init.weights}: expected the content that this run began at")


def begin(model: Transformer, path: str) -> None:
    """Fill the part of the model that is here, cast to its types.

    Raises ValueError naming the key unless what is at `path` is of this model, verified as it is read.
    """
    reader = _open(path)
    _require_same_model(model, path, reader)
    shapes, saved = parameter_shapes(model.config), reader.manifest.tensors
    known = {f"model/{locate(spec.name).parameter}" for spec in released_tensors(model.config, experts=1)}
    for name in sorted(name for name in saved.keys() - known if name.startswith("model/")):
        raise ValueError(f"{KEY} = {path}: expected no {name}, the model has none")
    with torch.no_grad():
        for name, tensor in names.tensors(model).items():
            source = f"optimizer/master/{name}" if f"optimizer/master/{name}" in saved else f"model/{name}"
            whole = shapes.get(name, tuple(tensor.shape))
            if source not in saved or saved[source].shape != whole:
                found = f"{list(saved[source].shape)}" if source in saved else "nothing"
                raise ValueError(f"{KEY} = {path}: expected {source} to be {list(whole)}, it is {found}")
            first = model.held.start if len(whole) and whole[0] != tensor.shape[0] else 0
            rows = max(1, SLAB_SIZE * len(tensor) // max(tensor.numel(), 1))
            for start in range(0, len(tensor), rows):
                stop = min(start + rows, len(tensor))
                tensor[start:stop].copy_(_rows(reader, source, first + start, first + stop, path))


def _open(path: str) -> Reader:
    folder = Path(path)
    if not (folder / COMMIT).is_file():
        is_released = (folder / "config.json").is_file()
        hint = "; a released folder goes through keel import first" if is_released else ""
        raise ValueError(f"{KEY} = {path}: expected what keel import made, or a checkpoint{hint}")
    try:
        return Reader(folder)
    except CheckpointError as error:
        raise ValueError(f"{KEY} = {path}: expected weights that verify: {error}") from error


def _require_same_model(model: Transformer, path: str, reader: Reader) -> None:
    about = reader.state.get(KIND)
    if about is None:
        return
    other = parse_config(Path(path) / "config.json", about["config"])
    key = first_difference(model.config, other)
    if key is not None:
        mine, theirs = getattr(model.config, key), getattr(other, key)
        raise ValueError(f"model.{key} = {mine}: expected {theirs}, which {KEY}={path} has")


def _rows(reader: Reader, name: str, start: int, stop: int, path: str) -> torch.Tensor:
    try:
        return reader.rows(name, start, stop)
    except CheckpointError as error:
        raise ValueError(f"{KEY} = {path}: expected weights that verify: {error}") from error
