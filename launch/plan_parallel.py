"""The part of `keel plan` about ranks: the mesh, what each rank holds and owns, memory by part, traffic of a step."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch import plan_pipe
from launch.plan_units import rounded, unit

if TYPE_CHECKING:
    from trainer.plan_parallel import Layout, Role

MOST_ROLES = 16
"""Ranks that are listed one by one, and roles that are listed at all."""
MEMORY_NOTES = (
    "row: the most at a time, while activations go and gradients come (plain functions, even loads); with threads=N, N",
    "rows at a time. update: reduced gradients and copies. total: the first five, and row or buffers with update",
)
TRAFFIC_NOTES = (
    "mean over the ranks, each byte passed on by a ring or sent pairwise; counts, losses and norms are a few KB more",
)
Row = Sequence[str]


def mesh(layout: "Layout") -> list[str]:
    """The axes, their sizes and what they share out."""
    of, experts = layout.mesh, layout.experts_held * layout.mesh.expert
    turns = f", {of.data // of.owners} times over" if of.data > of.owners else ""
    axes = (
        ("pipe", of.pipe, "layers"),
        ("context", of.context, "the tokens of a row"),
        ("data", of.data, "the rows of a step"),
        ("  expert", of.expert, f"experts, {layout.experts_held} of {experts} on a rank; tokens go to them"),
        ("  owners", of.owners, f"updates of dense matrices and tables{turns}"),
        ("  replicas", of.data // of.expert, "updates of the experts that these ranks all hold"),
    )
    name = f"mesh of {of.size:,} ranks" if of.size > 1 else "mesh of one process"
    lines = [f"{name:<20}size  shares out", *(f"{axis:<16}{size:>8,}  {text}" for axis, size, text in axes)]
    return [*lines, *_balance(layout)]


def _balance(layout: "Layout") -> list[str]:
    if layout.mesh.owners == 1:
        return []
    flop, state = layout.flop, layout.state
    lines = [f"largest dense share by the mean: {flop.of_mean:.3f} of FLOP, {state.of_mean:.3f} of bytes of state"]
    if max(flop.bound / flop.mean, state.bound / state.mean) > 1:
        lines.append(
            "whole matrices allow no less than "
            f"{flop.bound / flop.mean:.3f} and {state.bound / state.mean:.3f}: one is larger than the mean"
        )
    return lines


def ranks(layout: "Layout") -> list[Row]:
    """Each rank of a small mesh; of a large one each role, the largest and the smallest if they are many.

    Of many roles of a pipeline, the largest of each pipe rank.
    """
    of = layout.mesh
    where = ("pipe rank",) if of.pipe > 1 else ()
    heading: Row = (
        "rank",
        *where,
        "experts held",
        "dense owner",
        "owned",
        "elements",
        "update FLOP",
        "state",
        "memory",
    )
    if of.size <= MOST_ROLES:
        lines = [(str(place.rank), _held(layout, place.rank), layout.role_of(place.rank)) for place in of.places()]
        return [heading, *((name, *_pipe(layout, role), held, *_role(role)) for name, held, role in lines)]
    roles = list(layout.roles)
    if len(roles) > MOST_ROLES:
        which = "largest of" if of.pipe > 1 else "largest and smallest of"
        heading = (f"{which} {len(roles)} roles", *heading[1:])
        roles = layout.largest_by_pipe if of.pipe > 1 else [layout.largest, layout.smallest]
    named = [(_some(role.ranks), _held(layout, role.ranks[0]) if len(role.ranks) == 1 else "", role) for role in roles]
    return [heading, *((name, *_pipe(layout, role), held, *_role(role)) for name, held, role in named)]


def _pipe(layout: "Layout", role: "Role") -> Row:
    return (f"{role.pipe}",) if layout.mesh.pipe > 1 else ()


def _role(role: "Role") -> Row:
    load = role.load
    size = rounded(load.state_bytes)
    return (
        f"{role.owner}",
        f"{load.members}",
        f"{load.elements:,}",
        f"{load.flop:.3g}",
        size,
        rounded(role.memory.total),
    )


def _held(layout: "Layout", rank: int) -> str:
    first = layout.mesh.place(rank).expert * layout.experts_held
    return f"{first} to {first + layout.experts_held - 1}"


def _some(found: Sequence[int]) -> str:
    """The first ranks of a role, and how many there are."""
    some = ", ".join(map(str, found[:2]))
    return some if len(found) <= 2 else f"{some}, ... ({len(found)})"


def memory(layout: "Layout", dtype: str) -> list[Row]:
    """By part; of the largest and the smallest rank, or of the one that there is."""
    alone = layout.mesh.size == 1
    chosen = [layout.largest] if alone else [layout.largest, layout.smallest]
    names = [f"bytes, {dtype}"] if alone else [f"rank {role.ranks[0]}" for role in chosen]
    heading = "memory in one process" if alone else f"memory of a rank, {dtype}"
    columns = [role.memory.parts() | {"total": role.memory.total} for role in chosen]
    lines: list[Row] = [(heading, *(cell for name in names for cell in (name, "")))]
    for part in columns[0]:
        lines.append((part, *(cell for column in columns for cell in (f"{column[part]:,}", rounded(column[part])))))
    return lines


def activations(layout: "Layout") -> list[Row]:
    """What a row's forward pass keeps in all layers, by part and stage, and the most that a rank's rows take."""
    stages = layout.activations
    size, name = unit(max(max(parts.values()) for parts in stages))
    lines: list[Row] = [(f"kept of a row, {name}", *(f"stage {number}" for number in range(1, len(stages) + 1)))]
    for part in dict.fromkeys(part for parts in stages for part in parts):
        values = [parts.get(part, 0) for parts in stages]
        if any(values):
            lines.append((part.replace("_", " "), *(f"{value / size:.3f}" for value in values)))
    lines.append(("total", *(f"{sum(parts.values()) / size:.3f}" for parts in stages)))
    name = "most of the rows in flight on a rank" if layout.mesh.pipe > 1 else "most of a row at a time"
    most = [max(row.most for row in ranks) for ranks in zip(*layout.rows, strict=True)]
    return [*lines, (name, *(f"{value / size:.3f}" for value in most))]


def traffic(layout: "Layout") -> list[Row]:
    """Bytes that a rank sends in the last step of each stage, by collective; nothing for one process."""
    stages = [{one.name: one for one in stage} for stage in layout.traffic]
    names = {one.name: one for stage in layout.traffic for one in stage}
    if not names:
        return []
    ranks = layout.mesh.size
    size, name = unit(max(one.sent_bytes for one in names.values()) / ranks)
    numbers = [f"stage {number}" for number in range(1, len(stages) + 1)]
    lines: list[Row] = [(f"{name} sent by a rank in a step", "collective", "among", *numbers)]
    for name, one in names.items():
        sent = [stage[name].sent_bytes / ranks / size if name in stage else 0 for stage in stages]
        lines.append((name, one.kind, f"{one.group} {one.axis.replace('_', ' ')}", *(f"{value:.3f}" for value in sent)))
    totals = [sum(one.sent_bytes for one in stage.values()) / ranks / size for stage in stages]
    return [*lines, ("total", "", "", *(f"{total:.3f}" for total in totals))]


def as_json(layout: "Layout") -> dict[str, Any]:
    """All numbers, exact."""
    return {
        "mesh": asdict(layout.mesh) | {"size": layout.mesh.size},
        "experts_held": layout.experts_held,
        "balance": {
            name: asdict(one) | {"of_mean": one.of_mean, "of_bound": one.of_bound}
            for name, one in (("flop", layout.flop), ("state_bytes", layout.state))
        },
        "roles": [_role_json(role) for role in layout.roles],
        "activations_bytes": list(layout.activations),
        "rows_bytes": [[asdict(row) for row in rank] for rank in layout.rows],
        "dearest_stage": layout.dearest + 1,
        "traffic": [[asdict(one) for one in stage] for stage in layout.traffic],
        "pipeline": None if layout.pipeline is None else plan_pipe.as_json(layout.pipeline),
    }


def _role_json(role: "Role") -> dict[str, Any]:
    return {
        "ranks": list(role.ranks),
        "pipe": role.pipe,
        "owner": role.owner,
        "experts_owned": role.experts,
        "owned": asdict(role.load),
        "memory_bytes": role.memory.parts() | {"held": role.memory.held, "total": role.memory.total},
    }
