"""Proves that V4-Flash and V4-Pro on 256 to 4096 ranks are what their plans say, without the ranks.

A rank of each role is built: the bytes of all that it holds, and of all that it gives to the others in a step, equal
the plan's. Who owns what is checked for every rank of a mesh.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from model.count import parameters
from model.logical import logical_tensors, parameter_shapes
from optim import zero
from optim.groups import Member
from tests.dist import many
from tests.dist.test_plan_traffic import Told, added
from tests.trainer import steps
from tests.trainer.test_plan_memory import check_built
from trainer.config import TrainConfig
from trainer.members import members
from trainer.parallel import expert
from trainer.parallel.owners import Ownership, Share
from trainer.parallel.world import World
from trainer.plan_parallel import Layout, Role, layout

LENGTH = 4
"""Of a row: short, since its tokens are exchanged in earnest."""
FAST = ("parallel.reduction=fast", "parallel.dense_reduction=bf16")
DUALPIPEV = "parallel.schedule=dualpipev"
FLASH_256, FLASH_4096 = ("flash", 256, 64), ("flash", 4096, 64)
PRO_2048, PRO_4096 = ("pro", 2048, 128), ("pro", 4096, 64)


PARTS = "all_to_all same_owners"
"""Ranks that own the same add up parts that differ by a number: one rank's bytes are not quite another's."""


def planned(config: TrainConfig) -> Layout:
    """Of steps with a row for each data rank, or as many as a schedule asks for."""
    rows = config.parallel.mesh.data * rounds(config)
    return layout(config, [replace(steps.make_plan("sparse"), rows=rows, row_length=LENGTH)])


def rounds(config: TrainConfig) -> int:
    return config.parallel.chunks if config.parallel.schedule == "dualpipev" else 1


def listed(config: TrainConfig) -> list[Member]:
    return members(logical_tensors(config.model))


def check_role(config: TrainConfig, role: Role, world: World, every: Sequence[Member], own: Sequence[Member]) -> Told:
    """What a rank gives in a step, tokens apart, once it has what was planned. own: what it is to own."""
    parts = many.parts_of(config, world, every)
    assert {one.name for one in parts.ownership.members()} == {one.name for one in own}
    assert len(own) == role.load.members
    part = many.stages_of(config)[world.place.pipe]
    check_built(role.memory, parts, part, exact=config.parallel.reduction == "exact")
    return many.given_by(parts)


def check_all(config: TrainConfig) -> None:
    """All roles, and what all ranks give together."""
    of, every, total = planned(config), listed(config), Counter[tuple[str, int]]()
    owned = many.owned(config, every)
    for role in of.roles:
        with many.world_of(of.mesh, role.ranks[-1]) as world:
            told = check_role(config, role, world, every, owned[world.rank])
            told |= many.tokens_given(config, world, LENGTH) if role is of.roles[0] else {}
        for key, numbers in told.items():
            # The tokens of all layers, which the ranks of a column share out.
            number = of.mesh.data * rounds(config) if key.endswith("expert") else len(role.ranks)
            total.update({(key, at): number * one for at, one in enumerate(numbers)})
    expected = {(key, at): one for key, numbers in added(of.traffic[0]).items() for at, one in enumerate(numbers)}
    expected = {key: one for key, one in expected.items() if key[0] != "send pipe"}
    if (PARTS, 1) in expected:
        assert total.pop((PARTS, 1)) == pytest.approx(expected.pop((PARTS, 1)), rel=1e-4)
    assert total == expected


def check_some(config: TrainConfig) -> None:
    """The roles that take most and least, the first and the last; all ranks give alike, but owners of the same."""
    of, every = planned(config), listed(config)
    owned, total = many.owned(config, every), added(of.traffic[0])
    for role in {role.ranks: role for role in (of.roles[0], of.roles[-1], of.largest, of.smallest)}.values():
        with many.world_of(of.mesh, role.ranks[0]) as world:
            told = check_role(config, role, world, every, owned[world.rank])
        assert told.keys() == total.keys() - {"all_to_all expert"}
        for key in told.keys() - {"all_reduce same_owners", PARTS}:
            assert [of.mesh.size * number for number in told[key]] == total[key]


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(PRO_2048, id="pro 2048"), pytest.param(FLASH_256, id="flash 256", marks=pytest.mark.slow)],
)
def test_ranks_with_most_and_least_are_as_planned(mesh: tuple[str, int, int]) -> None:
    check_some(many.configured(*mesh))


@pytest.mark.parametrize("words", [(), FAST], ids=["exact", "fast"])
@pytest.mark.parametrize("recipe", ["flash", pytest.param("pro", marks=pytest.mark.slow)])
def test_all_roles_of_few_owners_are_as_planned(recipe: str, words: Sequence[str]) -> None:
    check_all(many.configured(recipe, 256, 64, "parallel.owners_limit=4", *words))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        pytest.param("flash", ("parallel.pipe=8",), id="flash"),
        pytest.param("flash", ("parallel.pipe=2", DUALPIPEV), id="flash, dualpipev", marks=pytest.mark.slow),
        pytest.param("flash", ("parallel.pipe=8", *FAST), id="flash, fast", marks=pytest.mark.slow),
        pytest.param("pro", ("parallel.pipe=16",), id="pro", marks=pytest.mark.slow),
        pytest.param("pro", ("parallel.pipe=2", DUALPIPEV, *FAST), id="pro, dualpipev, fast", marks=pytest.mark.slow),
    ],
)
def test_pipe_ranks_are_as_planned(recipe: str, words: Sequence[str]) -> None:
    """What each stage holds, both ends among them, and what it gives beside the streams."""
    check_all(many.configured(recipe, 8, 8, "parallel.owners_limit=2", *words))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [FLASH_4096, PRO_4096], ids=["flash 4096", "pro 4096"])
def test_all_roles_are_as_planned(mesh: tuple[str, int, int]) -> None:
    check_all(many.configured(*mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [FLASH_4096, PRO_4096], ids=["flash 4096", "pro 4096"])
def test_ranks_with_most_and_least_of_the_fast_path_are_as_planned(mesh: tuple[str, int, int]) -> None:
    check_some(many.configured(*mesh, *FAST))


@pytest.mark.parametrize("mesh", [FLASH_4096, PRO_4096], ids=["flash 4096", "pro 4096"])
def test_each_member_has_one_owner_among_those_that_hold_it(mesh: tuple[str, int, int]) -> None:
    """Experts one in the mesh, the others one in each owner group; each rank as much as its role."""
    config = many.configured(*mesh)
    of, every, shapes = planned(config), listed(config), parameter_shapes(config.model)
    owned, held = many.owned(config, every), config.model.n_routed_experts // of.mesh.expert
    times = Counter(member.name for own in owned for member in own)
    turns = dict.fromkeys((one.name for one in every if one.group != "experts"), of.mesh.data // of.mesh.owners)
    assert times == {member.name: turns.get(member.name, 1) for member in every}
    for first in range(0, of.mesh.size, of.mesh.owners):
        group = Counter(one.name for rank in of.mesh.owner_group(first) for one in owned[rank] if one.name in turns)
        assert group == dict.fromkeys(turns, 1)
    for role in of.roles:
        for rank in role.ranks:
            place = of.mesh.place(rank)
            assert all(one.name in turns or one.start // held == place.expert for one in owned[rank])
        sizes = {sum(zero.state_bytes(one, shapes) for one in owned[rank]) for rank in role.ranks}
        assert sizes == {role.load.state_bytes}
    experts = sum(counts["experts"] for counts in (parameters(config.model).main, parameters(config.model).mtp))
    whole = parameters(config.model).total
    elements = sum(len(role.ranks) * role.load.elements for role in of.roles)
    assert elements == experts + of.mesh.data // of.mesh.owners * (whole - experts)


def test_a_rank_speaks_with_the_groups_of_its_mesh() -> None:
    mesh = many.configured(*FLASH_4096).parallel.mesh
    for rank in (0, 63, 64, 2049, 4095):
        with many.world_of(mesh, rank) as world:
            assert world.place == mesh.place(rank)
            groups = (world.control, world.saving, world.data, world.expert, world.replicas, world.owners)
            ranks = (tuple(range(4096)),) * 3 + (
                mesh.expert_group(rank),
                mesh.replica_group(rank),
                mesh.owner_group(rank),
            )
            assert tuple(group.ranks for group in groups) == ranks
            assert world.same_owners.ranks == mesh.same_owner_group(rank)
            assert all(group.ranks[group.index] == rank for group in (*groups, world.same_owners))
            assert world.agree(False) is False


def debug() -> TrainConfig:
    return many.configured("debug", 8, 4, "parallel.owners_limit=4")


def one_too_many(self: expert.RowExperts, experts: expert.Experts, rows: int) -> None:
    rows_experts(self, experts, rows + 1)


def all_but_one(self: Ownership, parameters: Any, changed: set[str], *ways: Any) -> Iterator[tuple[str, Any]]:
    return publish(self, parameters, changed - {"norm.weight"}, *ways)


rows_experts, publish, exchange = expert.RowExperts.__init__, Ownership.publish, expert.exchange
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "all members but one's own": (Share, "is_mine", property(lambda self: self.owner != self.group.index)),
    "leaves of one row too many": (expert.RowExperts, "__init__", one_too_many),
    "sums apart on ranks that own the same": (Ownership, "_between_owners", lambda self, sums: None),
    "a weight that is not handed out": (Ownership, "publish", all_but_one),
    "tokens in fp64": (expert, "exchange", lambda x_PD, *way: exchange(x_PD.double(), *way).to(x_PD.dtype)),
}


def test_a_mesh_without_mistakes_is_as_planned() -> None:
    check_all(debug())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises(AssertionError):
        check_all(debug())
