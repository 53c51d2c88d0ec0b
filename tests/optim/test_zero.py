"""Proves that every row has exactly one owner, the same whatever the order of the members, and evenly within bounds.

Oracles: a walk over all rows; the definition of R 3.4.1 (spec 5.3) for experts; a bound that the greedy rule cannot
pass. Mistakes are planted and caught by the same checks.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from optim import zero
from optim.groups import Member
from optim.iterations import iterations_flop
from optim.newton_schulz import orthogonalize
from tests.optim.zero_checks import (
    Shapes,
    check_cover,
    check_dense,
    check_experts,
    dense,
    fixed,
    member,
    rows_of,
    stacked_experts,
)


@st.composite
def dense_models(draw: st.DrawFn) -> tuple[list[Member], Shapes]:
    """Matrices, some of them two in one tensor, tables and vectors, of any sizes."""
    members, shapes = [], {}
    sides = st.integers(1, 40)
    for number, (rows, columns) in enumerate(draw(st.lists(st.tuples(sides, sides), max_size=12))):
        name = f"matrix{number}"
        halves = draw(st.integers(1, 2))
        shapes[name] = (halves * rows, columns)
        members += [member(f"{name}.{half}", rows, "matrix", half * rows, name) for half in range(halves)]
    for number, rows in enumerate(draw(st.lists(st.integers(1, 300), max_size=2))):
        shapes[f"table{number}"] = (rows, 3)
        members.append(member(f"table{number}", rows, "table"))
    for number, rows in enumerate(draw(st.lists(sides, max_size=8))):
        shapes[f"vector{number}"] = (rows,)
        members.append(member(f"vector{number}", rows, "vector"))
    return members, shapes


@given(st.integers(1, 5000))
def test_a_table_is_cut_into_equal_parts(rows: int) -> None:
    table, other = member("table", rows, "table"), member("other", 7, "matrix")
    *parts, last = zero.cut([table, other], {"table": rows})
    assert last is other
    check_cover([*parts], [0] * len(parts), 1, {"table": (rows, 2)})
    assert len(parts) <= zero.TABLE_PARTS
    sizes = [part.stop - part.start for part in parts]
    assert set(sizes[:-1]) <= {sizes[0]}
    assert 0 < sizes[-1] <= sizes[0]
    assert sizes[0] == math.ceil(rows / zero.TABLE_PARTS)
    assert [part.name for part in parts] == [f"table[{part.start}:{part.stop}]" for part in parts]
    assert {(part.kind, part.group, part.parameter) for part in parts} == {("table", "attention", "table")}


def test_a_table_of_few_rows_has_a_part_for_each() -> None:
    assert len(zero.cut([member("table", 5, "table")], {"table": 5})) == 5


@settings(deadline=None)
@given(dense_models(), st.integers(1, 70))
def test_dense_members_have_one_owner_each_within_bounds(model: tuple[list[Member], Shapes], number: int) -> None:
    members, shapes = model
    members = zero.cut(members, rows_of(shapes))
    check_dense(members, zero.assign_dense(members, shapes, number), number, shapes)


@settings(deadline=None)
@given(dense_models(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_order_of_the_members_does_not_matter(
    model: tuple[list[Member], Shapes], number: int, random: Random
) -> None:
    members, shapes = model
    members = zero.cut(members, rows_of(shapes))
    shuffled = random.sample(members, len(members))
    first = zip(members, zero.assign_dense(members, shapes, number), strict=True)
    second = zip(shuffled, zero.assign_dense(shuffled, shapes, number), strict=True)
    assert {one.name: of for one, of in first} == {one.name: of for one, of in second}
    assert set(zero.spans(members)) == set(zero.spans(shuffled))


@given(st.integers(1, 30), st.integers(1, 8))
def test_equal_matrices_are_shared_out_evenly(matrices: int, number: int) -> None:
    members = [member(f"matrix{at}", 4, "matrix") for at in range(matrices)]
    owners = zero.assign_dense(members, {one.name: (4, 6) for one in members}, number)
    assert max(owners.count(of) for of in range(number)) == math.ceil(matrices / number)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 6), st.integers(1, 20))
def test_experts_are_split_evenly_by_kind(layers: int, first: int, held: int, number: int) -> None:
    members = stacked_experts(layers, range(first, first + held))
    owners = zero.assign_experts(members, number)
    check_experts(members, owners, number)
    for owner in range(number):
        found = zero.spans([one for one, of in zip(members, owners, strict=True) if of == owner])
        # Consecutive in one order of all: only the first parameter and the last can be held in part.
        assert sum(span.stop - span.start < held for span in found) <= 2


@pytest.mark.parametrize(("recipe", "most"), [("flash", 1.13), ("pro", 1.01)])
def test_the_released_models_are_balanced_at_64_owners(recipe: str, most: float) -> None:
    """Largest share of FLOP and of bytes by the mean; measured 1.121 and 1.007."""
    members, shapes = dense(recipe)
    owners = zero.assign_dense(members, shapes, 64)
    held = zero.loads(members, shapes, owners, 64)
    flop = zero.balance([load.flop for load in held], max(zero.update_flop(one, shapes) for one in members))
    size = zero.balance([load.state_bytes for load in held], max(zero.state_bytes(one, shapes) for one in members))
    assert flop.bound == flop.mean
    assert size.bound == size.mean
    assert flop.of_mean < most
    assert size.of_mean < most
    assert sum(load.elements for load in held) == sum(math.prod(zero.shape_of(one, shapes)) for one in members)


def test_a_balance_knows_its_bound() -> None:
    uneven = zero.balance([6, 1, 2], 6)
    assert (uneven.largest, uneven.mean, uneven.bound, uneven.of_mean, uneven.of_bound) == (6, 3.0, 6, 2.0, 1.0)
    assert zero.balance([0, 0], 0).of_mean == 1


@pytest.mark.parametrize(("R", "C"), [(16, 16), (16, 48), (64, 32)])
def test_the_update_costs_the_products_of_newton_schulz(R: int, C: int) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.ones(1, R, C))
    assert iterations_flop(R, C) == counter.get_total_flops()
    expert = replace(member("experts.0.w1", 1, "matrix"), parameter="experts.w1")
    assert zero.update_flop(expert, {"experts.w1": (3, R, C)}) == iterations_flop(R, C)


Assign = Callable[[Sequence[Member], Shapes, int], list[int]]


def with_kind(kind: str, owner: Callable[[int, int], int]) -> Assign:
    """The real assignment, but the members of a kind, in order, go where `owner(place, owners)` says."""

    def assign(members: Sequence[Member], shapes: Shapes, number: int) -> list[int]:
        owners = zero.assign_dense(members, shapes, number)
        for place, at in enumerate(at for at, one in enumerate(members) if one.kind == kind):
            owners[at] = owner(place, number)
        return owners

    return assign


MISTAKES: dict[str, Assign] = {
    "matrices by number": with_kind("matrix", lambda place, number: place * number // 11),
    "matrices to the first": with_kind("matrix", lambda place, number: 0),
    "table parts dealt out": with_kind("table", lambda place, number: place % number),
    "table parts to the first": with_kind("table", lambda place, number: 0),
    "vectors to the first": with_kind("vector", lambda place, number: 0),
}


def test_the_fixed_model_passes() -> None:
    members, shapes = fixed()
    check_dense(members, zero.assign_dense(members, shapes, 8), 8, shapes)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    members, shapes = fixed()
    with pytest.raises(AssertionError):
        check_dense(members, MISTAKES[mistake](members, shapes, 8), 8, shapes)


def test_flop_alone_would_leave_the_bytes_uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    members, shapes = dense("flash")
    monkeypatch.setattr(zero, "state_bytes", lambda one, shapes: 0)
    owners = zero.assign_dense(members, shapes, 64)
    monkeypatch.undo()
    held = [load.state_bytes for load in zero.loads(members, shapes, owners, 64)]
    assert max(held) > 1.4 * sum(held) / 64


def test_members_dropped_or_doubled_are_caught() -> None:
    members, shapes = fixed()
    owners = zero.assign_dense(members, shapes, 4)
    for wrong in (members[:-1], [*members[:-1], members[0]]):
        with pytest.raises(AssertionError):
            check_cover(wrong, owners[: len(wrong)], 4, shapes)


def test_spans_that_are_not_merged_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    members, shapes = fixed()
    merged = zero.spans
    monkeypatch.setattr(zero, "spans", lambda members: [span for one in members for span in merged([one])])
    with pytest.raises(AssertionError):
        check_cover(members, zero.assign_dense(members, shapes, 4), 4, shapes)


@pytest.mark.parametrize("order", [("w1", "w2", "w3"), ("w2", "w1", "w3")])
def test_another_order_of_experts_is_caught(order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "EXPERT_ORDER", order)
    members = stacked_experts(2, range(4))
    with pytest.raises(AssertionError):
        check_experts(members, zero.assign_experts(members, 4), 4)


def test_ownership_needs_no_torch() -> None:
    code = "import sys; import optim.zero; assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
