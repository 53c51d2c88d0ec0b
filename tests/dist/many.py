"""One rank of a mesh of thousands, in this process: its groups speak with nobody, its tensors have sizes and no values.

The groups are those that `trainer.parallel.world.start` makes, of torch's fake backend, which gives a rank back what it
gave. What a rank gives to them in a step is counted as in tests/dist/test_plan_traffic.py.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.open import Data
from launch.compose import compose
from model.logical import parameter_shapes
from optim import groups, zero
from optim.groups import Member
from tests.dist.test_plan_traffic import KINDS, Told, watch
from trainer import build, schedule
from trainer.config import TrainConfig
from trainer.device import DTYPES
from trainer.parallel import fast, reduce, stages
from trainer.parallel.expert import ExpertDispatcher
from trainer.parallel.mesh import Mesh
from trainer.parallel.owners import EXPERTS, ExactReduction
from trainer.parallel.placement import Placement
from trainer.parallel.world import World, start
from trainer.step import Parts

META = torch.device("meta")


def configured(recipe: str, data: int, expert: int, *words: str) -> TrainConfig:
    mesh = [f"parallel.data={data}", f"parallel.expert={expert}"]
    return compose([f"recipe={recipe}", "threads=1", *mesh, *words]).config


@contextmanager
def world_of(mesh: Mesh, rank: int) -> Iterator[World]:
    """The rank's world."""
    begin, group = dist.init_process_group, dist.new_group

    def fake(backend: str, *, store: Any, timeout: Any, **place: int) -> None:
        begin("fake", store=store, **place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "rendezvous", lambda *place, timeout: iter([(FakeStore(), *place[1:])]))
        patch.setattr(dist, "init_process_group", fake)
        patch.setattr(dist, "new_group", lambda ranks, **given: group(ranks, backend="fake"))
        world = start(mesh, Placement(rank=rank, size=mesh.size, local_rank=0, address=""), torch.device("cpu"))
    try:
        yield world
    finally:
        world.close()


def parts_of(config: TrainConfig, world: World, every: Sequence[Member]) -> Parts:
    """What the rank builds. every: the model's members; like schedule and table alike for all ranks, and long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "members", lambda logicals: every)
        patch.setattr(schedule, "plan", lambda config: None)
        patch.setattr(groups, "table", lambda *given: "")
        # What speaks with the neighbours in a pipeline; none of it holds anything.
        patch.setattr(build, "_pipeline", lambda config, model, world: None)
        # What exact sums are converted in takes no memory here; in parts of the usual size it takes a minute.
        patch.setattr(reduce, "CHUNK", 1 << 40)
        return build.build(config, cast(Data, SimpleNamespace(train=None)), META, world).parts


def given_by(parts: Parts) -> Told:
    """Calls and bytes by "kind axis" of the gradients and new weights of a step that trains everything."""
    seen, sizes, every = Counter[str](), Counter[str](), set(parts.groups)
    with pytest.MonkeyPatch.context() as patch:
        watch_within(patch, parts.world, seen, sizes)
        for module in (reduce, fast):
            patch.setattr(module, "CHUNK", 1 << 40)
        # No generator makes numbers for tensors without values.
        patch.setattr(fast, "generator_of", lambda *purpose, device: None)
        if isinstance(parts.sums, ExactReduction):
            bounds_P2 = torch.ones(len(parts.sums.totals()), 2, dtype=torch.float64)
            patch.setattr(parts.sums, "bounds", lambda: bounds_P2)
            patch.setattr(parts.sums, "join", lambda name, group: group.add(parts.sums.totals()[name]))
        parts.sums.begin(0, every)
        parts.sums.finish()
        parts.handout.begin({name: weight.detach() for name, weight in parts.model.named_parameters()}, every)
        parts.handout.settle()
    return {key: [seen[key], sizes[key]] for key in seen}


def tokens_given(config: TrainConfig, world: World, length: int) -> Told:
    """Calls and bytes of one row's tokens there and back: once for each layer, with the backward pass."""
    seen, sizes, model, dtype = Counter[str](), Counter[str](), config.model, DTYPES[config.precision.dtype]
    draw, dispatcher = torch.Generator().manual_seed(length), ExpertDispatcher(world.expert)
    with pytest.MonkeyPatch.context() as patch:
        watch_within(patch, world, seen, sizes)
        for T in [length] * model.num_hidden_layers + [length - 1] * model.num_nextn_predict_layers:
            expert_TE = torch.rand(T, model.n_routed_experts, generator=draw).argsort()
            expert_BTK = expert_TE[:, : model.num_experts_per_tok].unsqueeze(0)
            weight_BTK = torch.ones(expert_BTK.shape, requires_grad=True)
            h_BTD = torch.zeros(1, T, model.hidden_size, dtype=dtype, requires_grad=True)
            arrived = dispatcher.dispatch(h_BTD, expert_BTK, weight_BTK, model.n_routed_experts)
            y_PD = arrived.x_PD * arrived.weight_P.unsqueeze(-1).to(dtype)
            dispatcher.combine(y_PD, arrived, expert_BTK.shape).sum().backward()
    return {key: [seen[key], sizes[key]] for key in seen}


def watch_within(patch: pytest.MonkeyPatch, world: World, seen: Counter[str], sizes: Counter[str]) -> None:
    """`watch`, taken off again with the patch."""
    for kind in KINDS:
        patch.setattr(dist, kind, getattr(dist, kind))
    watch(world, seen, sizes)


def owned(config: TrainConfig, every: Sequence[Member]) -> list[list[Member]]:
    """By rank, what it owns: `optim.zero`'s assignment laid over the groups of the mesh, one after the other."""
    mesh, found = config.parallel.mesh, [list[Member]() for _ in range(config.parallel.mesh.size)]
    shapes, held = parameter_shapes(config.model), config.model.n_routed_experts // mesh.expert
    for part, line in zip(stages_of(config), range(0, mesh.size, mesh.data), strict=True):
        here = [member for member in every if part.holds(member.parameter)]
        dense = [member for member in here if member.group != EXPERTS]
        of_dense = zero.assign_dense(dense, shapes, mesh.owners)
        for first in range(line, line + mesh.data, mesh.owners):
            group = mesh.owner_group(first)
            for member, owner in zip(dense, of_dense, strict=True):
                found[group[owner]].append(member)
        by_rank: list[list[Member]] = [[] for _ in range(mesh.expert)]
        for member in here:
            if member.group == EXPERTS:
                by_rank[member.start // held].append(member)
        for expert, own in enumerate(by_rank):
            group = mesh.replica_group(line + expert)
            for member, owner in zip(own, zero.assign_experts(own, len(group)), strict=True):
                found[group[owner]].append(member)
    return found


def stages_of(config: TrainConfig) -> tuple[stages.Part, ...]:
    """What each pipe rank holds."""
    return stages.parts(config.parallel, config.model, stages.usual_row(config.schedule))
