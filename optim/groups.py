"""Which rule updates which logical tensor, as data and as one printed table (R 2.4; spec 5.1).

kind matrix: Muon. table (embedding, head): AdamW with decay. vector (norms, sinks, biases, gates): AdamW without.
Nothing here needs torch, so that a plan can be made without it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from optim.config import OptimConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One logical tensor: rows start:stop of dim 0 of a parameter; an expert is one row of an [E, F, D] stack."""

    name: str
    parameter: str
    start: int
    stop: int
    kind: Literal["matrix", "table", "vector"]
    group: str

    @property
    def rule(self) -> str:
        return "Muon" if self.kind == "matrix" else "AdamW"

    def view(self, tensor: "Tensor") -> "Tensor":
        """The member's part of a tensor shaped like its parameter; matrices as [R, C]."""
        part = tensor[self.start : self.stop]
        return part.squeeze(0) if part.dim() == 3 else part


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Rows start:stop of a parameter, counted in the whole one: adjacent members with one owner."""

    parameter: str
    start: int
    stop: int


def rate_scale(group: str, config: OptimConfig) -> float:
    """Multiplier of the learning rate for a group."""
    return config.rate_scale.get(group, 1.0)


def check(known: Collection[str], config: OptimConfig) -> None:
    """Raise ValueError when rate_scale or freeze names a group that is not known."""
    for key, named in (("optim.rate_scale", config.rate_scale), ("optim.freeze", config.freeze)):
        for group in named:
            if group not in known:
                raise ValueError(f"{key} = {group}: expected one of {', '.join(sorted(known))}")


def check_cover(members: Sequence[Member], parameters: Mapping[str, "Tensor"]) -> None:
    """Raise ValueError unless every row of every parameter is in exactly one member, all of one kind and one group."""
    by_parameter: dict[str, list[Member]] = {name: [] for name in parameters}
    for member in members:
        if member.parameter not in by_parameter:
            raise ValueError(f"member {member.name} = {member.parameter}: expected a parameter of the model")
        by_parameter[member.parameter].append(member)
    for name, parts in by_parameter.items():
        parameter, end = parameters[name], 0
        for part in sorted(parts, key=lambda member: (member.start, member.stop)):
            found = f"member {part.name} = rows {part.start}:{part.stop} of {name}"
            if part.start != end or part.stop <= part.start or part.stop > len(parameter):
                raise ValueError(f"{found}: expected rows from {end} on, within {len(parameter)}")
            if parameter.dim() == 3 and part.stop - part.start != 1:
                raise ValueError(f"{found}: expected one expert")
            if (part.kind, part.group) != (parts[0].kind, parts[0].group):
                kind = f"{part.kind}, {part.group}"
                raise ValueError(f"{found}, {kind}: expected {parts[0].kind}, {parts[0].group} as {parts[0].name}")
            end = part.stop
        if end != len(parameter):
            raise ValueError(f"members of {name} = rows 0:{end}: expected all {len(parameter)}")


def decay(kind: str, config: OptimConfig) -> float:
    """Weight decay by kind."""
    return {"matrix": config.muon.weight_decay, "table": config.adamw.weight_decay, "vector": 0.0}[kind]


def table(members: Sequence[Member], shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> str:
    """The assignment as text: one line per group and rule, with totals. A table in parts is one tensor."""
    lines = [("group", "rule", "tensors", "parameters", "decay", "rate x", "")]
    total_tensors = total_size = 0
    for group, kind in sorted({(member.group, member.kind) for member in members}):
        chosen = [member for member in members if (member.group, member.kind) == (group, kind)]
        size = sum((member.stop - member.start) * math.prod(shapes[member.parameter][1:]) for member in chosen)
        tensors = len({member.parameter for member in chosen} if kind == "table" else chosen)
        frozen = "frozen" if group in config.freeze else ""
        scale = f"{rate_scale(group, config):g}"
        lines.append((group, chosen[0].rule, f"{tensors}", f"{size}", f"{decay(kind, config):g}", scale, frozen))
        total_tensors, total_size = total_tensors + tensors, total_size + size
    lines.append(("total", "", f"{total_tensors}", f"{total_size}", "", "", ""))
    return aligned(lines, left={0, 1, 6})


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Rows of equal length as a table, the columns `left` flush left, all others flush right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = (
        [
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in cells)
