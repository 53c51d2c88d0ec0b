"""Who owns what: every logical tensor has one owner, which holds its master and state and updates it.

Source: R 3.4.1 (spec 5.3). Dense: whole matrices, balanced in FLOP and bytes, over a group of capped size.
Tables are cut into blocks of rows fixed by the model, so that no layout moves a border. Experts: all w2 of all layers,
then all w3, then all w1, split evenly, never inside a matrix. What needs torch is elsewhere: a plan is made of these
functions too.
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from optim.groups import Member, Span
from optim.iterations import iterations_flop

TABLE_PARTS = 64
"""Most members that a table is cut into, whatever the layout (ours)."""
STATE_NUMBERS = {"matrix": 2, "table": 3, "vector": 3}
"""Per element: the master, and Muon's momentum or AdamW's two moments."""
FP32_BYTES = 4
EXPERT_ORDER = ("w2", "w3", "w1")
"""down, up, gate: the order of R 3.4.1."""


def cut(members: Iterable[Member], rows: Mapping[str, int]) -> list[Member]:
    """Tables in at most TABLE_PARTS members of equal numbers of rows (the last may have fewer), the others as they are.

    rows: of every table, by parameter. The parts are named as embed.weight[0:2020].
    """
    return [part for member in members for part in (_parts(member, rows) if member.kind == "table" else [member])]


def _parts(member: Member, rows: Mapping[str, int]) -> list[Member]:
    whole = rows[member.parameter]
    assert (member.start, member.stop) == (0, whole), (member, whole)
    step = -(-whole // TABLE_PARTS)
    borders = [(start, min(start + step, whole)) for start in range(0, whole, step)]
    return [replace(member, name=f"{member.name}[{a}:{b}]", start=a, stop=b) for a, b in borders]


def assign_dense(members: Sequence[Member], shapes: Mapping[str, Sequence[int]], owners: int) -> list[int]:
    """The owner of each member, 0 to owners - 1; shapes: of whole parameters.

    Tables: part i of n to owner i * owners // n. Matrices: the longest processing time first, by the FLOP of
    Newton-Schulz, each to the owner whose FLOP and bytes of state, both in shares of the whole, would have the least
    maximum: at 64 owners FLOP alone would leave one with 1.5 times the mean of bytes. Ties go by name, then to the
    first owner. Vectors: the largest first, each to the owner with the fewest bytes.
    """
    found = dict(_contiguous_tables(members, owners))
    flop, size = [0] * owners, [0] * owners
    for at, owner in found.items():
        size[owner] += state_bytes(members[at], shapes)
    work = {at: update_flop(member, shapes) for at, member in enumerate(members) if member.kind == "matrix"}
    whole_flop = sum(work.values())
    whole_size = sum(state_bytes(member, shapes) for member in members)
    for at in sorted(work, key=lambda at: (-work[at], members[at].name)):
        own_flop, own_size = work[at], state_bytes(members[at], shapes)
        # Shares with a common denominator, so that they are compared exactly.
        fullest = [
            max((flop[owner] + own_flop) * whole_size, (size[owner] + own_size) * whole_flop) for owner in range(owners)
        ]
        found[at] = owner = fullest.index(min(fullest))
        flop[owner] += own_flop
        size[owner] += own_size
    vectors = {at: state_bytes(member, shapes) for at, member in enumerate(members) if member.kind == "vector"}
    lightest = sorted((held, owner) for owner, held in enumerate(size))
    for at in sorted(vectors, key=lambda at: (-vectors[at], members[at].name)):
        held, found[at] = lightest[0]
        heapq.heapreplace(lightest, (held + vectors[at], found[at]))
    return [found[at] for at in range(len(members))]


def _contiguous_tables(members: Sequence[Member], owners: int) -> Iterator[tuple[int, int]]:
    """Places of the tables' parts among the members, each with its owner."""
    by_table: dict[str, list[int]] = {}
    for at, member in enumerate(members):
        if member.kind == "table":
            by_table.setdefault(member.parameter, []).append(at)
    for parts in by_table.values():
        for place, at in enumerate(sorted(parts, key=lambda at: members[at].start)):
            yield at, place * owners // len(parts)


def assign_experts(members: Sequence[Member], ranks: int) -> list[int]:
    """The owner of each expert's matrix, 0 to ranks - 1: equal consecutive parts of all w2, then all w3, then all w1.

    Within a kind the given order counts: layer by layer, expert by expert. Parts differ by one matrix at most.
    """
    kinds = [EXPERT_ORDER.index(member.parameter.rpartition(".")[2]) for member in members]
    order = sorted(range(len(members)), key=lambda at: kinds[at])
    owners = [0] * len(members)
    for place, at in enumerate(order):
        owners[at] = place * ranks // len(members)
    return owners


def spans(members: Iterable[Member]) -> list[Span]:
    """One owner's members with neighbours of one parameter merged; parameters in the order in which they come."""
    by_parameter: dict[str, list[Member]] = {}
    for member in members:
        by_parameter.setdefault(member.parameter, []).append(member)
    found: list[Span] = []
    for parameter, parts in by_parameter.items():
        start = stop = -1
        for part in sorted(parts, key=lambda part: part.start):
            if part.start != stop:
                if stop >= 0:
                    found.append(Span(parameter=parameter, start=start, stop=stop))
                start = part.start
            stop = part.stop
        found.append(Span(parameter=parameter, start=start, stop=stop))
    return found


def shape_of(member: Member, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """The member's shape; an expert's is a matrix."""
    whole = shapes[member.parameter]
    return tuple(whole[1:]) if len(whole) == 3 else (member.stop - member.start, *whole[1:])


def update_flop(member: Member, shapes: Mapping[str, Sequence[int]]) -> int:
    """FLOP of the member's update: Newton-Schulz for a matrix; what is elementwise counts as nothing."""
    return iterations_flop(*shape_of(member, shapes)) if member.kind == "matrix" else 0


def state_bytes(member: Member, shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of the member's master and state, in fp32."""
    return FP32_BYTES * STATE_NUMBERS[member.kind] * math.prod(shape_of(member, shapes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What an owner has: logical tensors, their elements, bytes of masters and state in fp32, FLOP of an update."""

    members: int
    elements: int
    state_bytes: int
    flop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """How even a quantity is over the owners. bound: what no assignment of whole tensors can be below."""

    largest: int
    mean: float
    bound: float

    @property
    def of_mean(self) -> float:
        """The largest share by the mean; 1 where there is nothing to share."""
        return self.largest / self.mean if self.mean else 1.0

    @property
    def of_bound(self) -> float:
        """The largest share by the bound."""
        return self.largest / self.bound if self.bound else 1.0


def loads(
    members: Sequence[Member], shapes: Mapping[str, Sequence[int]], owners: Sequence[int], number: int
) -> list[Load]:
    """What each of `number` owners has; owners: of the members, as assigned."""
    by_owner: list[list[Member]] = [[] for _ in range(number)]
    for member, owner in zip(members, owners, strict=True):
        by_owner[owner].append(member)
    return [
        Load(
            members=len(own),
            elements=sum(math.prod(shape_of(member, shapes)) for member in own),
            state_bytes=sum(state_bytes(member, shapes) for member in own),
            flop=sum(update_flop(member, shapes) for member in own),
        )
        for own in by_owner
    ]


def balance(shares: Sequence[int], largest_member: int) -> Balance:
    """Of the owners' shares of a quantity; largest_member: the largest that one logical tensor has of it."""
    mean = sum(shares) / len(shares)
    return Balance(largest=max(shares), mean=mean, bound=max(mean, largest_member))
