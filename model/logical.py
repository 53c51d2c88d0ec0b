"""Where released tensors lie in the model's parameters, and the optimizer's logical tensors, from a configuration.

Names are the released ones, except that a layer's experts are stacked. Nothing here needs torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.config import CSA_RATIO, ModelConfig
from model.inventory import Group, TensorSpec, released_tensors

if TYPE_CHECKING:
    from torch import Tensor

_EXPERT = re.compile(r"(.*\.ffn\.experts)\.(\d+)\.(w[123])\.weight")

LogicalKind = Literal["matrix", "table", "vector"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a released tensor lives: `parameter` of the model, whole, or its entry `index` of the stacked experts."""

    parameter: str
    index: int | None

    def view(self, tensor: "Tensor", first: int = 0) -> "Tensor":
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
    for spec in released_tensors(config, experts=1):
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
