"""The mesh: which rank stands where on the axes pipe, context, data and expert, by arithmetic alone.

    rank = (pipe * contexts + context) * data_size + data        data = expert_data * expert_size + expert

expert lies inside data: neighbouring data ranks share out the experts of a layer and exchange tokens; ranks with the
same `expert` hold the same experts and are replicas of them. Everything else is replicated over data.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one rank stands. data: on the whole data axis; expert, expert_data: its two parts."""

    rank: int
    pipe: int
    context: int
    data: int
    expert: int
    expert_data: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Sizes of the axes. `expert` divides `data`, `owners` divides `data`.

    owners: data ranks that share out the dense matrices among them (R 3.4.1, the capped group); the next `owners` ranks
    own the same ones again.
    """

    pipe: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    owners: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.pipe * self.context * self.data

    def place(self, rank: int) -> Place:
        """The coordinates of a rank."""
        assert 0 <= rank < self.size, (rank, self.size)
        line, data = divmod(rank, self.data)
        pipe, context = divmod(line, self.context)
        expert_data, expert = divmod(data, self.expert)
        return Place(rank=rank, pipe=pipe, context=context, data=data, expert=expert, expert_data=expert_data)

    def places(self) -> Iterator[Place]:
        """All ranks in order."""
        return (self.place(rank) for rank in range(self.size))

    def data_group(self, rank: int) -> tuple[int, ...]:
        """Ranks with other rows and the same part of the model, experts apart; in order of `data`."""
        first = rank - self.place(rank).data
        return tuple(range(first, first + self.data))

    def column_group(self, rank: int) -> tuple[int, ...]:
        """Ranks with the same rows and other layers, first stage first."""
        line = self.context * self.data
        return tuple(range(rank % line, self.size, line))

    def end_group(self, rank: int) -> tuple[int, ...]:
        """First and last stage of a column, which both use the embedding; in between a rank is alone."""
        column = self.column_group(rank)
        ends = (column[0], column[-1])
        return ends if rank in ends and len(column) > 1 else (rank,)

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that share out the experts and exchange tokens, in order of `expert`."""
        first = rank - self.place(rank).expert
        return tuple(range(first, first + self.expert))

    def replica_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same experts, in order of `expert_data`; all of them own a part of these."""
        place = self.place(rank)
        first = rank - place.data + place.expert
        return tuple(range(first, first + self.data, self.expert))

    def owner_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that share out the dense matrices, this one among them."""
        first = rank - self.place(rank).data % self.owners
        return tuple(range(first, first + self.owners))

    def same_owner_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that own the same dense matrices."""
        place = self.place(rank)
        first = rank - place.data + place.data % self.owners
        return tuple(range(first, first + self.data, self.owners))


def rows_of(data: int, ranks: int, rows: int) -> tuple[int | None, ...]:
    """The rows of a step that data rank `data` computes, one a round, None where the last round has none for it.

    Row i is computed by rank i mod ranks, in round i div ranks.
    """
    return tuple(row if row < rows else None for row in range(data, -(-rows // ranks) * ranks, ranks))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`, which is at least 1."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
