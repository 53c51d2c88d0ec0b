"""Our tensors and the released checkpoint: same names, except that experts are stacked.

`inventory.py` lists the released tensors, `logical.py` says where they are; here they meet the built model.
`load_released` reads a released folder.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

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


def config_from_keys(path: Path, raw: Mapping[str, Any]) -> ModelConfig:
    """`config_from_released` of what a config.json says. path: where it was read, for errors."""
    _refuse_unknown(path, "", raw, ModelConfig, NOT_ARCHITECTURE)
    known = {field.name for field in fields(ModelConfig)}
    values: dict[str, Any] = {key: value for key, value in raw.items() if key in known}
    values["compress_ratios"] = tuple(values["compress_ratios"])
    if values.get("rope_scaling") is not None:
        _refuse_unknown(path, "rope_scaling.", values["rope_scaling"], RopeScaling)
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    return ModelConfig(**values)


def _refuse_unknown(
    path: Path, prefix: str, raw: Mapping[str, object], of: type, ignored: frozenset[str] = frozenset()
) -> None:
    for key in sorted(set(raw) - {field.name for field in fields(of)} - ignored):
        raise ValueError(f"{path}: {prefix}{key} = {raw[key]!r}: expected a key of {of.__name__}")


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
