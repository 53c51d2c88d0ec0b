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
from trainer import plan_memory, plan_traffic
from trainer.config import TrainConfig
from trainer.members import members
from trainer.parallel.mesh import Mesh
from trainer.plan_memory import Memory, RowMemory, Tensors
from trainer.plan_traffic import Collective, Shares
from trainer.schedule import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """Ranks alike in bytes, in order. owner: their number among the owners of dense matrices.

    experts: experts' matrices that each owns. load: of all it owns. memory: in the stage that takes the most.
    """

    ranks: tuple[int, ...]
    owner: int
    experts: int
    load: Load
    memory: Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A run's ranks. experts_held: of each layer on a rank. roles: by first rank.

    flop, state: of the dense members over their owners. activations: of a row, by stage and part. rows: what a row
    takes, by stage. dearest: the stage whose rows take the most. traffic: by stage, of its last step.
    """

    mesh: Mesh
    experts_held: int
    roles: tuple[Role, ...]
    flop: Balance
    state: Balance
    activations: tuple[dict[str, int], ...]
    rows: tuple[RowMemory, ...]
    dearest: int
    traffic: tuple[tuple[Collective, ...], ...]

    @property
    def largest(self) -> Role:
        """The role that takes the most memory."""
        return max(self.roles, key=lambda role: role.memory.total)

    @property
    def smallest(self) -> Role:
        """The role that takes the least memory."""
        return min(self.roles, key=lambda role: role.memory.total)

    def role_of(self, rank: int) -> Role:
        """A rank's role."""
        return next(role for role in self.roles if rank in role.ranks)


def layout(config: TrainConfig, steps: Sequence[StepPlan]) -> Layout:
    """The layout of a run; steps: the last of each stage."""
    mesh = config.parallel.mesh
    model = plan_memory.tensors(config.model, plan_memory.DTYPE_BYTES[config.precision.dtype])
    every = members(logical_tensors(config.model))
    held = config.model.n_routed_experts // mesh.expert
    dense = [member for member in every if member.group != "experts"]
    stacked = [member for member in every if member.group == "experts" and member.start < held]
    shares = Shares(
        dense=_shared_out(dense, zero.assign_dense(dense, model.shapes, mesh.owners), mesh.owners),
        experts=_shared_out(stacked, zero.assign_experts(stacked, mesh.data // mesh.expert), mesh.data // mesh.expert),
    )
    rows = tuple(plan_memory.row_memory(config, model, step) for step in steps)
    dearest = max(range(len(rows)), key=lambda stage: rows[stage].most)
    flop = [[zero.update_flop(one, model.shapes) for one in own] for own in shares.dense]
    state = [[zero.state_bytes(one, model.shapes) for one in own] for own in shares.dense]
    return Layout(
        mesh=mesh,
        experts_held=held,
        roles=tuple(_roles(config, model, shares, rows[dearest])),
        flop=_balance(flop),
        state=_balance(state),
        activations=tuple(plan_memory.activations(config, step) for step in steps),
        rows=rows,
        dearest=dearest,
        traffic=tuple(plan_traffic.traffic(config, step, model, shares) for step in steps),
    )


def _shared_out(given: Sequence[Member], owners: Sequence[int], number: int) -> tuple[tuple[Member, ...], ...]:
    found: list[list[Member]] = [[] for _ in range(number)]
    for member, owner in zip(given, owners, strict=True):
        found[owner].append(member)
    return tuple(map(tuple, found))


def _balance(by_owner: Sequence[Sequence[int]]) -> Balance:
    return zero.balance([sum(own) for own in by_owner], max(size for own in by_owner for size in own))


def _roles(config: TrainConfig, model: Tensors, shares: Shares, row: RowMemory) -> list[Role]:
    mesh = config.parallel.mesh
    ranks: dict[tuple[int, int], list[int]] = {}
    for place in mesh.places():
        alike = place.data % mesh.owners, len(shares.experts[place.expert_data])
        ranks.setdefault(alike, []).append(place.rank)
    examples = {len(own): own for own in shares.experts}
    return [
        Role(
            ranks=tuple(found),
            owner=owner,
            experts=experts,
            load=_load([*shares.dense[owner], *examples[experts]], model),
            memory=plan_memory.memory(config, model, shares.dense[owner], experts, row),
        )
        for (owner, experts), found in ranks.items()
    ]


def _load(own: Sequence[Member], model: Tensors) -> Load:
    (load,) = zero.loads(own, model.shapes, [0] * len(own), 1)
    return load
