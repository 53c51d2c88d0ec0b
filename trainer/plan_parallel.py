"""What each rank of a mesh holds, owns and sends, from the configuration alone; without torch.

Ranks that hold and own as much as each other have one role. Dense matrices have owners among `Mesh.owner_group`,
experts among `Mesh.replica_group`, as `optim.zero` assigns them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.logical import logical_tensors
from optim import zero
from optim.groups import Member
from optim.zero import Balance, Load
from trainer import plan_memory, plan_pipe, plan_rows, plan_traffic
from trainer.config import TrainConfig
from trainer.members import members
from trainer.parallel import stages
from trainer.parallel.mesh import Mesh
from trainer.parallel.simulate import Profile
from trainer.parallel.stages import Part
from trainer.plan_memory import Memory, RowMemory, Tensors
from trainer.plan_pipe import Pipeline
from trainer.plan_traffic import Collective, Shares
from trainer.schedule import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """Ranks alike in bytes, in order. pipe: their coordinate. owner: number among the owners of dense matrices.

    experts: experts' matrices that each owns. load: of all it owns. memory: in the stage that takes the most.
    """

    ranks: tuple[int, ...]
    pipe: int
    owner: int
    experts: int
    load: Load
    memory: Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A run's ranks. experts_held: of each layer on a rank. roles: by first rank.

    flop, state: of the dense members over the owners of all pipe ranks. activations: of a row in all layers, by stage
    of the schedule and part. rows: what rows take, by pipe rank and stage. dearest: the stage whose rows take the most.
    traffic: by stage, of its last step. pipeline: None on one pipe rank.
    """

    mesh: Mesh
    experts_held: int
    roles: tuple[Role, ...]
    flop: Balance
    state: Balance
    activations: tuple[dict[str, int], ...]
    rows: tuple[tuple[RowMemory, ...], ...]
    dearest: int
    traffic: tuple[tuple[Collective, ...], ...]
    pipeline: Pipeline | None

    @property
    def largest(self) -> Role:
        """The role that takes the most memory."""
        return max(self.roles, key=lambda role: role.memory.total)

    @property
    def smallest(self) -> Role:
        """The role that takes the least memory."""
        return min(self.roles, key=lambda role: role.memory.total)

    @property
    def largest_by_pipe(self) -> list[Role]:
        """The role of each pipe rank that takes the most memory."""
        by_pipe = ([role for role in self.roles if role.pipe == rank] for rank in range(self.mesh.pipe))
        return [max(roles, key=lambda role: role.memory.total) for roles in by_pipe]

    def role_of(self, rank: int) -> Role:
        """A rank's role."""
        return next(role for role in self.roles if rank in role.ranks)


def layout(config: TrainConfig, steps: Sequence[StepPlan], measured: Profile | None = None) -> Layout:
    """The layout of a run; steps: the last of each stage. measured: times of the passes of a pipeline, if known."""
    mesh, every = config.parallel.mesh, members(logical_tensors(config.model))
    parts = stages.parts(config.parallel, config.model, stages.usual_row(config.schedule))
    pipe = [_shares(config, part, every) for part in parts]
    rows = tuple(tuple(plan_rows.row_memory(config, of.model, step, of.part) for step in steps) for of in pipe)
    dearest = max(range(len(steps)), key=lambda stage: max(of[stage].most for of in rows))
    owners = [(of.model, own) for of in pipe for own in of.dense]
    flop = [[zero.update_flop(one, model.shapes) for one in own] for model, own in owners]
    state = [[zero.state_bytes(one, model.shapes) for one in own] for model, own in owners]
    return Layout(
        mesh=mesh,
        experts_held=config.model.n_routed_experts // mesh.expert,
        roles=tuple(_roles(config, pipe, [of[dearest] for of in rows])),
        flop=_balance(flop),
        state=_balance(state),
        activations=tuple(plan_rows.activations(config, step) for step in steps),
        rows=rows,
        dearest=dearest,
        traffic=tuple(plan_traffic.traffic(config, step, pipe) for step in steps),
        pipeline=plan_pipe.pipeline(config, steps, parts, measured) if mesh.pipe > 1 else None,
    )


def _shares(config: TrainConfig, part: Part, every: Sequence[Member]) -> Shares:
    """What a pipe rank holds and who owns it: as `trainer.parallel.owners` has it."""
    mesh = config.parallel.mesh
    held, replicas = config.model.n_routed_experts // mesh.expert, mesh.data // mesh.expert
    model = plan_memory.tensors(config, part)
    here = [member for member in every if member.parameter in model.shapes]
    dense = [member for member in here if member.group != "experts"]
    stacked = [member for member in here if member.group == "experts" and member.start < held]
    return Shares(
        part=part,
        model=model,
        dense=_shared_out(dense, zero.assign_dense(dense, model.shapes, mesh.owners), mesh.owners),
        experts=_shared_out(stacked, zero.assign_experts(stacked, replicas), replicas),
    )


def _shared_out(given: Sequence[Member], owners: Sequence[int], number: int) -> tuple[tuple[Member, ...], ...]:
    found: list[list[Member]] = [[] for _ in range(number)]
    for member, owner in zip(given, owners, strict=True):
        found[owner].append(member)
    return tuple(map(tuple, found))


def _balance(by_owner: Sequence[Sequence[int]]) -> Balance:
    return zero.balance([sum(own) for own in by_owner], max(size for own in by_owner for size in own))


def _roles(config: TrainConfig, pipe: Sequence[Shares], rows: Sequence[RowMemory]) -> list[Role]:
    mesh = config.parallel.mesh
    ranks: dict[tuple[int, int, int], list[int]] = {}
    for place in mesh.places():
        alike = place.pipe, place.data % mesh.owners, len(pipe[place.pipe].experts[place.expert_data])
        ranks.setdefault(alike, []).append(place.rank)
    examples = [{len(own): own for own in shares.experts} for shares in pipe]
    return [
        Role(
            ranks=tuple(found),
            pipe=at,
            owner=owner,
            experts=experts,
            load=_load([*pipe[at].dense[owner], *examples[at][experts]], pipe[at].model),
            memory=plan_memory.memory(config, pipe[at].model, pipe[at].dense[owner], experts, rows[at]),
        )
        for (at, owner, experts), found in ranks.items()
    ]


def _load(own: Sequence[Member], model: Tensors) -> Load:
    (load,) = zero.loads(own, model.shapes, [0] * len(own), 1)
    return load
