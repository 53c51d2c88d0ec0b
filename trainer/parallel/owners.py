"""Who owns what: the spans of each rank, sums of gradients to their owners, new weights from them to everybody.

Dense members belong to the ranks of `Mesh.owner_group`, experts to those of `Mesh.replica_group`. A rank's optimizer
knows its own spans only; each is a tensor of its own there, a view of the parameter's rows.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import names
from model.transformer import Transformer
from optim import zero
from optim.groups import Member, Span
from trainer.parallel.reduce import ExactSum
from trainer.parallel.world import Group, World
from trainer.precision.wire import Wire

EXPERTS = "experts"
"""The parameter group that expert ranks share out."""
Masters = Callable[[str], Tensor]
"""The fp32 master of an own span, by its key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One owner's spans of a group of ranks. dense: not of experts."""

    group: Group
    owner: int
    spans: tuple[Span, ...]
    dense: bool

    @property
    def is_mine(self) -> bool:
        return self.owner == self.group.index


class Ownership:
    """What this rank holds and owns. members: `zero.cut`; model: the part that is here.

    A parameter that two stages use, the embedding, is owned in both; `tied` names it on either.
    """

    def __init__(
        self, members: Sequence[Member], shapes: Mapping[str, Sequence[int]], model: Transformer, world: World
    ) -> None:
        """shapes: of whole parameters."""
        self._shapes, self._first, self._world = shapes, model.held.start, world
        present = set(names.tensors(model))
        is_one_end = model.is_first != model.is_last and model.config.num_nextn_predict_layers > 0
        self.tied = ("embed.weight",) if is_one_end else ()
        self._told_elsewhere = () if model.is_first else self.tied
        experts = [member for member in members if member.group == EXPERTS]
        here = [member for member in experts if member.start in model.held and member.parameter in present]
        dense = [member for member in members if member.group != EXPERTS and member.parameter in present]
        self._stacked = {member.parameter for member in experts}
        self.shares = (
            *_shares(dense, zero.assign_dense(dense, shapes, world.owners.size), world.owners, dense=True),
            *_shares(here, zero.assign_experts(here, world.replicas.size), world.replicas, dense=False),
        )
        self.spans = tuple(span for share in self.shares if share.is_mine for span in share.spans)
        self._members: dict[str, list[Member]] = {}
        for member in (*dense, *here):
            self._members.setdefault(member.parameter, []).append(member)
        self.kinds = {member.parameter: member.kind for member in members}
        """By parameter, whole or not here at all."""

    @property
    def rank(self) -> int:
        """This rank's number among all."""
        return self._world.rank

    def rows(self, span: Span, tensor: Tensor) -> Tensor:
        """A span's rows of what this rank holds of its parameter, or of a tensor shaped like that."""
        first = self._first if span.parameter in self._stacked else 0
        return tensor[span.start - first : span.stop - first]

    def whole_shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter on one process."""
        return tuple(self._shapes[parameter])

    def is_expert(self, parameter: str) -> bool:
        """True for the stacked weights of experts."""
        return parameter in self._stacked

    def first_row(self, parameter: str) -> int:
        """The row of the whole parameter at which the part that is held begins."""
        return self._first if parameter in self._stacked else 0

    def key(self, span: Span) -> str:
        """The name of a span in this rank's optimizer: its parameter's where it is whole."""
        whole = span.stop - span.start == self._shapes[span.parameter][0]
        return span.parameter if whole else f"{span.parameter}[{span.start}:{span.stop}]"

    def held(self) -> Iterator[tuple[Member, Callable[[Tensor], Tensor]]]:
        """All members of which this rank has the weights, and where in what it holds of their parameter."""
        for of_parameter in self._members.values():
            for member in of_parameter:
                first = self.first_row(member.parameter)
                yield member, replace(member, start=member.start - first, stop=member.stop - first).view

    def members(self) -> list[Member]:
        """The members of the own spans, as the optimizer knows them."""
        return list(self._mine(lambda member: True))

    def counted(self) -> set[str]:
        """Names of the members that this rank tells of: of those that several own, one does."""
        first = self._world.same_owners.index == 0
        told = (member for member in self._mine(lambda member: first or member.group == EXPERTS))
        return {member.name for member in told if not self.is_told_elsewhere(member.parameter.partition("[")[0])}

    def is_told_elsewhere(self, parameter: str) -> bool:
        """Whether another stage, which has the same parameter, tells of it and writes it."""
        return parameter in self._told_elsewhere

    def _mine(self, wanted: Callable[[Member], bool]) -> Iterator[Member]:
        for span in self.spans:
            for member in self._within(span):
                if wanted(member):
                    yield replace(member, parameter=self.key(span))

    def reduce(self, sums: ExactSum) -> dict[str, Tensor]:
        """Bring the ranks' sums together; returns the gradients of the own spans by key. sums: exact ones."""
        world = self._world
        for parameter in self.tied:
            sums.join(parameter, world.ends)
        first = world.data.ranks[0]
        replicas = [rank - first for rank in world.replicas.ranks]
        sums.merge(world.data.gather_rows(sums.bounds()), dict.fromkeys(self._stacked, replicas))
        waiting = []
        for share in self.shares:
            for span in share.spans:
                if share.group.size > 1 and sums.is_touched(span.parameter):
                    total = self.rows(span, sums.totals()[span.parameter])
                    to = share.group.ranks[share.owner]
                    waiting.append(dist.reduce(total, to, group=share.group.handle, async_op=True))
        _wait(waiting)
        if world.same_owners.size > 1:
            self._between_owners(sums)
        return {self.key(span): sums.read(span.parameter, self._local(span)) for span in self.spans}

    def sum_between_ends(self, totals: Mapping[str, Tensor]) -> None:
        """Add the sums that first and last stage have of the parameters that both use, in place. totals: by name."""
        for total in (totals[parameter] for parameter in self.tied if parameter in totals):
            first, last = self._world.ends.gather_rows(total)
            total.copy_(first + last)

    def sum_between_owners(self, x_P: Tensor) -> Tensor:
        """Of sums over an owner group's rows, those over all: added in the order of the ranks that own the same.

        Each of these ranks adds a part up and hands it to the others, so that n of them send 2 P numbers, not n P.
        """
        group = self._world.same_owners
        if group.size == 1:
            return x_P
        sizes = [len(part_P) for part_P in x_P.tensor_split(group.size)]
        mine = [sizes[group.index]] * group.size
        first_P, *others = group.swap(x_P, sizes, mine).view(group.size, mine[0])
        for other_P in others:
            first_P = first_P + other_P
        return group.swap(first_P.repeat(group.size), mine, sizes)

    def _between_owners(self, sums: ExactSum) -> None:
        """Ranks that own the same dense spans have sums of different rows: all of them get the whole."""
        group = self._world.same_owners
        dense = [span for span in self.spans if span.parameter not in self._stacked]
        touched = [span for span in dense if sums.is_touched(span.parameter)]
        totals = [self.rows(span, sums.totals()[span.parameter]) for span in touched]
        _wait([dist.all_reduce(total, group=group.handle, async_op=True) for total in totals])

    def _local(self, span: Span) -> slice:
        first = self.first_row(span.parameter)
        return slice(span.start - first, span.stop - first)

    def publish(
        self, parameters: Mapping[str, Tensor], changed: Collection[str], wire: Wire, masters: Masters
    ) -> Iterator[tuple[str, "Arrival"]]:
        """Hand the owners' new weights of the parameters `changed` to all ranks that hold them.

        As bytes, or as codes of the owners' masters (by key) where the wire takes them. Yields each parameter and what
        is to come.
        """
        for share in self.shares:
            for span in share.spans:
                if share.group.size > 1 and span.parameter in changed:
                    rows = self.rows(span, parameters[span.parameter])
                    coded = wire.takes(span.parameter)
                    send = self._send_codes if coded else self._send_bytes
                    yield span.parameter, send(share, span, rows, wire, masters)

    def _send_bytes(self, share: Share, span: Span, rows: Tensor, wire: Wire, masters: Masters) -> "Arrival":
        source = share.group.ranks[share.owner]
        work = dist.broadcast(rows.view(torch.uint8), source, group=share.group.handle, async_op=True)
        return Arrival(work=work)

    def _send_codes(self, share: Share, span: Span, rows: Tensor, wire: Wire, masters: Masters) -> "Arrival":
        weights = [member.view(rows) for member in self._within(span)]
        if share.is_mine:
            master = masters(self.key(span))
            sent = wire.pack(span.parameter, [member.view(master) for member in self._within(span)])
        else:
            size = wire.size(span.parameter, [weight.shape for weight in weights])
            sent = torch.empty(size, dtype=torch.uint8, device=rows.device)
        work = dist.broadcast(sent, share.group.ranks[share.owner], group=share.group.handle, async_op=True)
        if share.is_mine:
            return Arrival(work=work)
        return Arrival(work=work, take=lambda: wire.unpack(span.parameter, sent, weights))

    def _within(self, span: Span) -> Iterator[Member]:
        """The members of a span, by their rows in it."""
        for member in self._members[span.parameter]:
            if span.start <= member.start < span.stop:
                yield replace(member, start=member.start - span.start, stop=member.stop - span.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """Weights on their way. take: what is to be done with them when they are there."""

    work: Any
    take: Callable[[], None] | None = None

    def settle(self) -> None:
        """Return when they are where they belong."""
        self.work.wait()
        if self.take is not None:
            self.take()


class ExactReduction(ExactSum):
    """Exact sums of a rank's leaves, and their way to the owners: the same bits on any layout."""

    def __init__(
        self, shapes: Mapping[str, torch.Size], ownership: Ownership, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shapes, dtype, device)
        self._ownership = ownership

    def begin(self, step: int, active: Collection[str]) -> None:
        """Start the sums of a step; exact sums need to know neither its number nor what it trains."""
        self.reset()

    def begin_row(self, *, last: bool) -> None:
        """Exact sums leave when all rows are done."""

    def finish(self) -> dict[str, Tensor]:
        """The gradients of the own spans by key, of all ranks' rows; every rank calls it after its last row."""
        return self._ownership.reduce(self)


class Handout:
    """New weights from their owners to everybody."""

    def __init__(self, ownership: Ownership, wire: Wire, masters: Masters) -> None:
        self._ownership, self._wire, self._masters = ownership, wire, masters

    def begin(self, parameters: Mapping[str, Tensor], changed: Collection[str]) -> None:
        """Send and receive the new weights of `changed`."""
        for _, arrival in list(self._publish(parameters, changed)):
            arrival.settle()

    def _publish(self, parameters: Mapping[str, Tensor], changed: Collection[str]) -> Iterator[tuple[str, Arrival]]:
        return self._ownership.publish(parameters, changed, self._wire, self._masters)

    def settle(self) -> None:
        """Return when all weights are there."""


def _shares(members: Sequence[Member], owners: Sequence[int], group: Group, *, dense: bool) -> Iterator[Share]:
    by_owner: list[list[Member]] = [[] for _ in group.ranks]
    for member, owner in zip(members, owners, strict=True):
        by_owner[owner].append(member)
    for owner, own in enumerate(by_owner):
        yield Share(group=group, owner=owner, spans=tuple(zero.spans(own)), dense=dense)


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
