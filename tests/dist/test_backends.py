"""Proves that block-scaled products keep up with the weights they keep codes of: in steps, in views, on any layout."""

from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.dist import ranks
from tests.dist.ranks import LENGTH, Case, Steps
from tests.trainer.precision.hopper import stand_in
from tests.trainer.precision.recipes import recipe
from trainer.parallel.mesh import Mesh
from trainer.precision.operands import Kept, WeightCodes

ROWS = (4, 3, 5, 2)
BLOCKS = replace(recipe("fp8_fp4", "fp32", LENGTH * 7), backend="torch")
CASE = Case(rows=ROWS, changes={"precision": BLOCKS}, plant=stand_in)
EMULATED = Case(rows=ROWS, changes={"precision": replace(BLOCKS, backend="emulated")})
LIMIT = 2e-3
"""Of weights, relative to the largest: after some steps, sums in another order have turned a few codes."""


def in_one_process(case: Case, **changes: object) -> Steps:
    """The case's steps here, with the stand-in where it asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        if case.plant is not None:
            case.plant(patch)
        return ranks.take_alone(replace(case, changes={**case.changes, **changes}))


def assert_near(found: Steps, expected: Steps) -> None:
    """Weights and losses are those of the emulated products but for the order of sums."""
    for name, tensor in expected.tensors.items():
        if name.startswith("model/") and tensor.is_floating_point():
            assert float((found.tensors[name] - tensor).abs().max()) <= LIMIT * float(tensor.abs().max()), name
    losses = [[told["loss/lm"] for told in steps.figures] for steps in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def alone() -> Steps:
    return in_one_process(CASE)


def test_steps_are_those_of_the_emulated_products(alone: Steps) -> None:
    assert_near(alone, in_one_process(EMULATED))


def test_each_view_of_the_model_has_the_weights_of_the_step(alone: Steps) -> None:
    assert ranks.differences(alone, in_one_process(CASE, threads=2)) == []


@pytest.mark.parametrize("mesh", [Mesh(data=2, owners=2), Mesh(data=2, expert=2, owners=2)], ids=["data", "expert"])
def test_each_rank_has_the_weights_of_the_step(
    mesh: Mesh, alone: Steps, processes: BaseContext, tmp_path: Path
) -> None:
    assert ranks.differences(alone, ranks.run(processes, CASE, mesh, tmp_path)) == []


def test_weights_that_arrive_during_a_pass_are_those_of_the_step(processes: BaseContext, tmp_path: Path) -> None:
    """The fast path: a layer waits for its own weights, and its codes are made of them. Both on one layout."""
    mesh = Mesh(data=2, expert=2, owners=2)
    found, expected = (
        ranks.run(processes, replace(case, changes={**case.changes, "parallel": {"reduction": "fast"}}), mesh, tmp_path)
        for case in (CASE, EMULATED)
    )
    assert_near(found, expected)


def first_codes_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Whatever is written to a weight, its codes stay those of before."""
    stand_in(patch)
    of, made = Kept.of, dict[tuple[Kept, int], WeightCodes]()
    patch.setattr(Kept, "of", lambda self, weight: made.setdefault((self, weight.data_ptr()), of(self, weight)))


def test_codes_of_weights_before_would_be_seen(alone: Steps) -> None:
    assert ranks.differences(alone, in_one_process(replace(CASE, plant=first_codes_for_ever))) != []
