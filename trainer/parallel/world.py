"""The processes of a run and what they say to each other: groups of ranks, and the few collectives the trainer uses.

One process has the same interface; then no group exists and torch.distributed is not started. Numbers that decide
something go by `gather` or by integers, so that every rank decides alike.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.heartbeat import Beat
from trainer.parallel.mesh import Mesh, Place
from trainer.parallel.placement import Placement

PATIENCE = timedelta(minutes=10)
"""How long a collective waits for a rank that does not come (ours)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Ranks that speak with each other, in order; handle None where there is only this one."""

    ranks: tuple[int, ...]
    index: int
    handle: Any = None

    @property
    def rank(self) -> int:
        """This one's number in the group, under the name that a crew of checkpoints has for it."""
        return self.index

    @property
    def size(self) -> int:
        return len(self.ranks)

    def gather(self, thing: Any) -> list[Any]:
        """What every rank of the group has given, in order, on all of them; for small things."""
        if self.handle is None:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.handle)
        return things

    def gather_rows(self, x_P: Tensor) -> Tensor:
        """[size, P]: the tensors of all ranks of the group, which have one shape and type."""
        if self.handle is None:
            return x_P.unsqueeze(0)
        rows = [torch.empty_like(x_P) for _ in self.ranks]
        dist.all_gather(rows, x_P, group=self.handle)
        return torch.stack(rows)

    def swap(self, x_P: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Consecutive parts of x to each rank, in order: sent[r] numbers to rank r; received[r] come from it."""
        came_P = x_P.new_empty(sum(received))
        dist.all_to_all_single(came_P, x_P, list(received), list(sent), group=self.handle)
        return came_P

    def add(self, x: Tensor) -> None:
        """Add the integer tensors of all ranks, in place."""
        assert not x.is_floating_point(), "floats would be added in an order that nobody chose"
        if self.handle is not None:
            dist.all_reduce(x, group=self.handle)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """All ranks, and this one's groups: `control` and `saving` always on CPUs, the others where the tensors are.

    saving: all ranks, for the thread that writes checkpoints. The others: see the methods of `Mesh`.
    """

    mesh: Mesh = field(default_factory=Mesh)
    place: Place = field(default_factory=lambda: Mesh().place(0))
    control: Group = Group(ranks=(0,), index=0)
    saving: Group = Group(ranks=(0,), index=0)
    data: Group = Group(ranks=(0,), index=0)
    expert: Group = Group(ranks=(0,), index=0)
    replicas: Group = Group(ranks=(0,), index=0)
    owners: Group = Group(ranks=(0,), index=0)
    same_owners: Group = Group(ranks=(0,), index=0)
    column: Group = Group(ranks=(0,), index=0)
    ends: Group = Group(ranks=(0,), index=0)
    beat: Beat = field(default_factory=Beat)

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.mesh.size

    @property
    def is_first(self) -> bool:
        """True on the rank that speaks and writes for all."""
        return self.rank == 0

    def gather(self, thing: Any) -> list[Any]:
        """What every rank has given, in order, on all of them; for small things."""
        return self.control.gather(thing)

    def from_first(self, thing: Any) -> Any:
        """What rank 0 has given, on all ranks."""
        if self.control.handle is None:
            return thing
        things = [thing]
        dist.broadcast_object_list(things, src=0, group=self.control.handle)
        return things[0]

    def agree(self, flag: bool) -> bool:
        """True on all ranks if it is on any."""
        return self.least(0 if flag else 1) == 0

    def least(self, number: int) -> int:
        """The smallest of all ranks' integers."""
        if self.control.handle is None:
            return number
        least = torch.tensor(number)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.control.handle)
        return int(least)

    def totals(self, numbers: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """By key, the sum over all ranks' numbers, rounded once: the same however they are shared out."""
        parts: dict[str, list[float]] = {}
        for of_rank in self.gather({key: exact_parts(values) for key, values in numbers.items()}):
            for key, values in of_rank.items():
                parts.setdefault(key, []).extend(values)
        return {key: math.fsum(values) for key, values in parts.items()}

    def close(self) -> None:
        """Leave; every rank does."""
        if self.control.handle is not None:
            dist.destroy_process_group()


ALONE = World()
"""The world of one process."""


def exact_parts(numbers: Sequence[float]) -> list[float]:
    """A few numbers whose exact sum is that of all, so that sums of parts lose nothing; [nan] unless all are finite."""
    if not all(map(math.isfinite, numbers)):
        return [math.nan]
    parts: list[float] = []
    while rest := math.fsum((*numbers, *(-part for part in parts))):
        parts.append(rest)
    return parts


def start(
    mesh: Mesh, place: Placement, device: torch.device, patience: timedelta = PATIENCE, beat: Beat | None = None
) -> World:
    """Join the run's other processes; all of them call this. One process joins nothing.

    The store has a part for each attempt: a process of the one before, late, finds nobody there. On GPUs every group is
    connected here, not by its first call: so a rank that cannot be reached is noticed before training, and no call in a
    step waits for connections. For that torch is told which GPU this process has, and splits the groups off each other.
    """
    beat = beat or Beat(place)
    if mesh.size == 1:
        return replace(ALONE, beat=beat)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, *_ = next(dist.rendezvous(place.address, place.rank, place.size, timeout=patience))
    store = dist.PrefixStore(f"attempt-{place.attempt}", store)
    gpu = torch.device("cuda", device.index or 0) if device.type == "cuda" else None
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.size, timeout=patience, device_id=gpu
    )
    everybody = tuple(range(mesh.size))
    speech = [_group({everybody}, place.rank, "gloo", patience) for _ in range(2)]

    def groups(of: Callable[[int], tuple[int, ...]]) -> Group:
        return _group(_distinct(of, mesh.size), place.rank, None, patience)

    return World(
        mesh=mesh,
        place=mesh.place(place.rank),
        control=speech[0],
        saving=speech[1],
        data=groups(mesh.data_group),
        expert=groups(mesh.expert_group),
        replicas=groups(mesh.replica_group),
        owners=groups(mesh.owner_group),
        same_owners=groups(mesh.same_owner_group),
        column=groups(mesh.column_group),
        ends=groups(mesh.end_group),
        beat=beat,
    )


def _distinct(of: Callable[[int], tuple[int, ...]], size: int) -> Iterator[tuple[int, ...]]:
    """Each group once, by its first rank: asking every rank for its own would take the square of their number."""
    seen: set[int] = set()
    for rank in range(size):
        if rank not in seen:
            ranks = of(rank)
            seen.update(ranks)
            yield ranks


def _group(all_ranks: Any, rank: int, backend: str | None, patience: timedelta) -> Group:
    """Make the groups, in one order on every rank, and return this rank's; groups of one rank need no handle."""
    mine = None
    for ranks in all_ranks:
        handle = dist.new_group(list(ranks), timeout=patience, backend=backend) if len(ranks) > 1 else None
        if rank in ranks:
            mine = Group(ranks=ranks, index=ranks.index(rank), handle=handle)
    assert mine is not None, "the groups of an axis hold every rank"
    return mine
