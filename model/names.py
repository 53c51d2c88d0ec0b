"""Our tensors and the released checkpoint: same names, except that experts are stacked; and Muon's logical matrices.

`inventory.py` lists the released tensors; here they meet the built model. `load_released` reads a released folder.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import CSA_RATIO, ModelConfig, RopeScaling
from model.inventory import Group, TensorSpec, released_tensors
from model.transformer import Transformer

_EXPERT = re.compile(r"(.*\.ffn\.experts)\.(\d+)\.(w[123])\.weight")

LogicalKind = Literal["matrix", "table", "vector"]

NOT_ARCHITECTURE = frozenset(
    [
        "architectures",
        "auto_map",
        "dtype",
        "expert_dtype",
        "initializer_range",
        "model_type",
        "pad_token_id",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
"""Keys of a released config.json that do not change what the model computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a released tensor lives: `parameter` of the model, whole, or its entry `index` of the stacked experts."""

    parameter: str
    index: int | None

    def view(self, tensor: Tensor, first: int = 0) -> Tensor:
        """The released tensor's part of its parameter. first: the first expert that is here."""
        return tensor if self.index is None else tensor[self.index - first]


@dataclass(frozen=True, kw_only=True, slots=True)
class Logical:
    """One logically independent tensor for the optimizer: rows start:stop of dim 0 of `parameter` (spec 5.1, 5.2)."""

    name: str
    parameter: str
    start: int
    stop: int
    kind: LogicalKind
    group: Group


def locate(name: str) -> Location:
    """The location of a released tensor name."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return Location(parameter=name, index=None)
    return Location(parameter=f"{match[1]}.{match[3]}", index=int(match[2]))


def tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters and buffers of the model by name, without the MTP branch's second names of embedding and head."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in named.items() if alias_of(name) is None}


def alias_of(parameter: str) -> str | None:
    """The main model's name of a shared weight that the MTP branch uses under its own, else None."""
    match = re.fullmatch(r"mtp\.\d+\.(embed|head)\.weight", parameter)
    return f"{match[1]}.weight" if match else None


def logical_tensors(config: ModelConfig) -> Iterator[Logical]:
    """What Muon and AdamW see: each expert, each group of wo_a, each compressor series, each mHC mix apart.

    Source: R 2.4 "logically independent", our reading (spec 5.2). Buffers are not among them.
    """
    for spec in released_tensors(config):
        kind = spec.kind
        if kind == "buffer":
            continue
        where = locate(spec.name)
        if where.index is not None:
            at = slice(where.index, where.index + 1)
            yield _logical(spec.name, where.parameter, at, kind, spec.group)
            continue
        start = 0
        for suffix, rows in _parts(spec, config):
            at = slice(start, start + rows)
            yield _logical(spec.name + suffix, where.parameter, at, kind, spec.group)
            start += rows


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every whole parameter of the model, experts stacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in released_tensors(config):
        where = locate(spec.name)
        if spec.kind != "buffer":
            stacked = () if where.index is None else (config.n_routed_experts,)
            shapes[where.parameter] = (*stacked, *spec.shape)
    return shapes


def _logical(name: str, parameter: str, at: slice, kind: LogicalKind, group: Group) -> Logical:
    return Logical(name=name, parameter=parameter, start=at.start, stop=at.stop, kind=kind, group=group)


def _parts(spec: TensorSpec, config: ModelConfig) -> list[tuple[str, int]]:
    """Suffix and rows of the logical matrices stacked in one released tensor, in order."""
    rows, N = spec.shape[0], config.hc_mult
    if spec.name.endswith(("hc_attn_fn", "hc_ffn_fn")):
        return [(".pre", N), (".post", N), (".comb", N * N)]
    if spec.name.endswith("attn.wo_a.weight"):
        return [(f".group{g}", rows // config.o_groups) for g in range(config.o_groups)]
    if _is_overlapped(spec, config):
        return [(".previous", rows // 2), (".current", rows // 2)]
    return [("", rows)]


def _is_overlapped(spec: TensorSpec, config: ModelConfig) -> bool:
    """True for wkv and wgate of a CSA compressor: two series of channels in one tensor."""
    if not spec.name.endswith(("compressor.wkv.weight", "compressor.wgate.weight")):
        return False
    return config.compress_ratios[int(spec.name.split(".")[1])] == CSA_RATIO


def config_from_released(folder: Path) -> ModelConfig:
    """The ModelConfig of a released config.json; an unknown key raises ValueError rather than being ignored."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    _refuse_unknown(path, "", raw, ModelConfig, NOT_ARCHITECTURE)
    known = {field.name for field in fields(ModelConfig)}
    values = {key: value for key, value in raw.items() if key in known}
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

    Stored tensors must be F32, F16, BF16 or F64 (I64 for tid2eid). Raises ValueError naming the first tensor that is
    missing, unexpected, quantised or of another shape.
    """
    folder = Path(folder)
    config = config_from_released(folder)
    model = Transformer(config, dtype)
    mine, missing = tensors(model), {spec.name: spec for spec in released_tensors(config)}
    for name, stored in _stored_tensors(folder):
        spec = missing.pop(name, None)
        if spec is None:
            raise ValueError(f"{folder}: {name}: expected no such tensor for this config.json")
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
