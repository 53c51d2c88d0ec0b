"""Our tensors and the released checkpoint: same names, except that experts are stacked.

`inventory.py` lists the released tensors, `logical.py` says where they are; here they meet the built model.
`load_released` reads a released folder.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.inventory import released_tensors
from model.logical import alias_of, locate
from model.transformer import Transformer

NOT_ARCHITECTURE = frozenset(
    [
        "architectures",
        "auto_map",
        "compress_rates",
        "dtype",
        "expert_dtype",
        "initializer_range",
        "layer_types",
        "model_type",
        "pad_token_id",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
"""Keys of a released config.json that do not change what the model computes, or say again what others do."""


def tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters and buffers of the model by name, without the MTP branch's second names of embedding and head."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in named.items() if alias_of(name) is None}


def config_from_released(folder: Path) -> ModelConfig:
    """The ModelConfig of a released config.json; an unknown key raises ValueError rather than being ignored."""
    path = folder / "config.json"
    return config_from_keys(path, json.loads(path.read_text()))


def config_from_keys(path: Path, raw: Any) -> ModelConfig:
    """`config_from_released` of what a config.json says. path: where it was read, for errors.

    Raises ValueError naming file, key and value for whatever is missing, unknown, of another type or not V4's.
    """
    return _build(path, "", raw, ModelConfig, NOT_ARCHITECTURE)


def _build(path: Path, prefix: str, raw: Any, of: type, ignored: frozenset[str] = frozenset()) -> Any:
    """A dataclass from a JSON object that has its fields as keys."""
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {prefix.removesuffix('.') or 'content'} = {raw!r}: expected a JSON object")
    hints, values = get_type_hints(of), {}
    for key in sorted(raw.keys() - hints.keys() - ignored):
        raise ValueError(f"{path}: {prefix}{key} = {raw[key]!r}: expected a key of {of.__name__}")
    for field in fields(of):
        if field.name not in raw:
            if field.default is MISSING:
                raise ValueError(f"{path}: {prefix}{field.name} = nothing: expected a value")
            continue
        hint, value = hints[field.name], raw[field.name]
        if wrong := _wrong(hint, value):
            raise ValueError(f"{path}: {prefix}{field.name} = {value!r}: expected {wrong}")
        if hint == RopeScaling | None and value is not None:
            value = _build(path, f"{field.name}.", value, RopeScaling)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return of(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {prefix}{error}") from error


def _wrong(hint: Any, value: Any) -> str:
    """What was expected where a value from JSON is not what a field may be; empty where it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if get_origin(hint) is Literal:
        holds = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in get_args(hint))
        return "" if holds else " or ".join(map(json.dumps, get_args(hint)))
    if hint is float:
        return "" if is_number and abs(value) <= sys.float_info.max else "a finite number"
    if hint is int:
        return "" if type(value) is int else "an integer"
    if hint == tuple[int, ...]:
        return "" if isinstance(value, list) and all(type(one) is int for one in value) else "a list of integers"
    return ""


def load_released(folder: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Build the model of a folder in the released format: config.json and *.safetensors with the released names.

    Stored tensors must be F32, F16, BF16 or F64 (I64 for tid2eid); `trainer.released.load.load` reads quantised ones.
    Raises ValueError naming the first tensor that is missing, unexpected, quantised or of another shape.
    """
    folder = Path(folder)
    config = config_from_released(folder)
    model = Transformer(config, dtype)
    mine, missing = tensors(model), {spec.name: spec for spec in released_tensors(config)}
    for name, stored in _stored_tensors(folder):
        spec = missing.pop(name, None)
        if spec is None:
            hint = "; trainer.released.load reads quantised folders" if name.endswith(".scale") else ""
            raise ValueError(f"{folder}: {name}: expected no such tensor for this config.json{hint}")
        if tuple(stored.shape) != spec.shape or stored.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
            found = f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"{folder}: {name} = {found}: expected an unquantised tensor {list(spec.shape)}")
        where = locate(name)
        with torch.no_grad():
            where.view(mine[where.parameter]).copy_(stored)
    if missing:
        raise ValueError(f"{folder}: {next(iter(missing))}: expected this tensor, none of {len(missing)} missing found")
    return model


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.name.startswith(("weights", "model"))]
    if not files:
        raise ValueError(f"{folder}: expected weights*.safetensors or model*.safetensors")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                yield name, file.get_tensor(name)
