"""Proves the rank arithmetic: ranks and places correspond one to one, groups partition the ranks, rows have one home.

Oracle: an array of all ranks with one dimension per axis, sliced, where the mesh calculates.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.parallel.mesh import Mesh, Place, largest_divisor, rows_of

Group = Callable[[Mesh, int], tuple[int, ...]]
GROUPS: dict[str, Group] = {
    "data": Mesh.data_group,
    "expert": Mesh.expert_group,
    "replicas": Mesh.replica_group,
    "owners": Mesh.owner_group,
    "same owners": Mesh.same_owner_group,
}


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    data = draw(st.integers(1, 24))
    divisors = st.sampled_from([size for size in range(1, data + 1) if data % size == 0])
    return Mesh(
        pipe=draw(st.integers(1, 4)),
        context=draw(st.integers(1, 3)),
        data=data,
        expert=draw(divisors),
        owners=draw(divisors),
    )


def ranks_of(mesh: Mesh) -> np.ndarray:
    """All ranks, [pipe, context, expert_data, expert]."""
    sizes = (mesh.pipe, mesh.context, mesh.data // mesh.expert, mesh.expert)
    return np.arange(math.prod(sizes)).reshape(sizes)


def sliced(mesh: Mesh, name: str, place: Place) -> tuple[int, ...]:
    """A group as a slice of the array."""
    line = ranks_of(mesh)[place.pipe, place.context]
    flat = line.reshape(-1)
    turn, at = divmod(place.data, mesh.owners)
    return {
        "data": tuple(flat.tolist()),
        "expert": tuple(line[place.expert_data].tolist()),
        "replicas": tuple(line[:, place.expert].tolist()),
        "owners": tuple(flat.reshape(-1, mesh.owners)[turn].tolist()),
        "same owners": tuple(flat.reshape(-1, mesh.owners)[:, at].tolist()),
    }[name]


def check_place(mesh: Mesh, place: Place) -> None:
    """A rank's place is its index in the array of ranks."""
    assert ranks_of(mesh)[place.pipe, place.context, place.expert_data, place.expert] == place.rank
    assert place.data == place.expert_data * mesh.expert + place.expert


def check_group(mesh: Mesh, name: str) -> None:
    """Groups are the slices of the array; every member finds the same one, and together they are all ranks once."""
    found = {rank: GROUPS[name](mesh, rank) for rank in range(mesh.size)}
    for rank, ranks in found.items():
        assert ranks == sliced(mesh, name, mesh.place(rank))
        assert rank in ranks
        assert all(found[other] == ranks for other in ranks)
    assert sorted(rank for ranks in set(found.values()) for rank in ranks) == list(range(mesh.size))


@given(meshes())
def test_ranks_and_places_correspond_one_to_one(mesh: Mesh) -> None:
    places = list(mesh.places())
    assert len(places) == mesh.size == ranks_of(mesh).size
    assert [place.rank for place in places] == list(range(mesh.size))
    for place in places:
        check_place(mesh, place)
    assert len({(place.pipe, place.context, place.data) for place in places}) == mesh.size


@pytest.mark.parametrize("rank", [-1, 24])
def test_a_rank_outside_the_mesh_has_no_place(rank: int) -> None:
    with pytest.raises(AssertionError):
        Mesh(pipe=2, data=12, expert=4).place(rank)


@pytest.mark.parametrize("name", GROUPS)
@given(mesh=meshes())
def test_groups_partition_the_ranks(name: str, mesh: Mesh) -> None:
    check_group(mesh, name)


@given(meshes())
def test_two_ranks_share_an_expert_group_or_a_replica_group_but_not_both(mesh: Mesh) -> None:
    for rank in range(mesh.size):
        assert set(mesh.expert_group(rank)) & set(mesh.replica_group(rank)) == {rank}
        assert set(mesh.owner_group(rank)) & set(mesh.same_owner_group(rank)) == {rank}
        assert set(mesh.expert_group(rank)) | set(mesh.replica_group(rank)) <= set(mesh.data_group(rank))
        assert len(mesh.expert_group(rank)) * len(mesh.replica_group(rank)) == mesh.data


@given(meshes())
def test_a_replica_group_computes_every_row_with_its_experts(mesh: Mesh) -> None:
    """The expert groups of a replica group's ranks are all data ranks: their sums together are those of all rows."""
    for rank in range(mesh.size):
        seen = [other for replica in mesh.replica_group(rank) for other in mesh.expert_group(replica)]
        assert sorted(seen) == list(mesh.data_group(rank))


def check_rows(ranks: int, rows: int, of: Callable[[int, int, int], tuple[int | None, ...]]) -> None:
    """Every row once; all ranks take part in every round; row i is in round i div ranks."""
    by_rank = [of(data, ranks, rows) for data in range(ranks)]
    assert {len(mine) for mine in by_rank} == {math.ceil(rows / ranks)}
    rounds = itertools.chain.from_iterable(zip(*by_rank, strict=True))
    assert list(rounds) == [*range(rows), *[None] * (-rows % ranks)]


@given(st.integers(1, 50), st.integers(0, 200))
def test_every_row_has_one_home(ranks: int, rows: int) -> None:
    check_rows(ranks, rows, rows_of)


@given(st.integers(1, 3000), st.integers(1, 100))
def test_the_largest_divisor_within_a_limit(number: int, limit: int) -> None:
    assert largest_divisor(number, limit) == max(n for n in range(1, limit + 1) if number % n == 0)


MISTAKES: dict[str, Group] = {
    "owners": lambda mesh, rank: tuple(range(rank // mesh.owners * mesh.owners, rank // mesh.owners * mesh.owners + 3)),
    "expert": lambda mesh, rank: mesh.replica_group(rank),
    "replicas": lambda mesh, rank: tuple(range(rank % mesh.expert, mesh.size, mesh.expert)),
    "data": lambda mesh, rank: tuple(range(mesh.data)),
    "same owners": lambda mesh, rank: mesh.same_owner_group(rank)[::-1],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_in_groups_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(pipe=2, data=12, expert=3, owners=4)
    check_group(mesh, name)
    monkeypatch.setitem(GROUPS, name, MISTAKES[name])
    with pytest.raises(AssertionError):
        check_group(mesh, name)


def test_expert_outside_data_is_caught() -> None:
    mesh = Mesh(data=12, expert=3, owners=4)
    for rank in range(1, 11):
        expert, expert_data = divmod(rank, 4)
        wrong = Place(rank=rank, pipe=0, context=0, data=rank, expert=expert, expert_data=expert_data)
        with pytest.raises(AssertionError):
            check_place(mesh, wrong)


def test_rows_dealt_in_blocks_or_left_out_are_caught() -> None:
    def in_blocks(data: int, ranks: int, rows: int) -> tuple[int | None, ...]:
        each = -(-rows // ranks)
        return tuple(row if row < rows else None for row in range(data * each, (data + 1) * each))

    def without_the_rest(data: int, ranks: int, rows: int) -> tuple[int | None, ...]:
        return rows_of(data, ranks, rows - rows % ranks)

    for wrong in (in_blocks, without_the_rest):
        with pytest.raises(AssertionError):
            check_rows(3, 8, wrong)
