"""Proves that numbers that are none on one rank end the step on all of them, for the row one process names, undone."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.batch import Batch
from model.dispatch import Dispatched, LocalDispatcher
from tests.dist import ranks, sessions
from tests.dist.ranks import Case, Plant, Steps
from tests.dist.sessions import Session
from tests.runs import tiny
from trainer import loop, step
from trainer import row as rows
from trainer.folder import RunFolder
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import ALONE, World, start
from trainer.row import RowSums
from trainer.schedule import StepPlan
from trainer.step import Parts, StepResult

CASE = Case(rows=(4, 3, 5))
STEP = 2
"""The step in which something is planted: sparse, five rows; on four ranks three have none in its last round."""
BAD = float("nan")
Learn = Callable[..., RowSums]


def around(patch: pytest.MonkeyPatch, rows: Collection[int], learn_them: Callable[[Learn, nn.Module], RowSums]) -> None:
    """learn_them(the learning of that row, the model) in place of `step.learn` for these rows of the step."""
    learn, chosen = step.learn, ranks.rows_of_step(STEP, CASE.rows[STEP]).batch.token_BT[list(rows)]

    def learn_spoiled(model: nn.Module, one: Batch, *rest: Any) -> RowSums:
        if not any(torch.equal(one.token_BT[0], token_T) for token_T in chosen):
            return learn(model, one, *rest)
        return learn_them(lambda: learn(model, one, *rest), model)

    patch.setattr(step, "learn", learn_spoiled)


def bad_loss(row: int, patch: pytest.MonkeyPatch) -> None:
    around(patch, [row], lambda learn, model: replace(learn(), mtp=BAD))


def bad_activations(row: int, patch: pytest.MonkeyPatch) -> None:
    """From the embedding on, so that other ranks' experts get some of them."""

    def learn_from_bad(learn: Learn, model: nn.Module) -> RowSums:
        handle = model.embed.register_forward_hook(lambda module, given, h: h * BAD)
        try:
            return learn()
        finally:
            handle.remove()

    around(patch, [row], learn_from_bad)


def gradient(rows: Collection[int], value: float, patch: pytest.MonkeyPatch) -> None:
    """One number in a gradient that each rank has of its own rows."""

    def learn_and_set(learn: Learn, model: nn.Module) -> RowSums:
        sums = learn()
        model.norm.weight.grad[0] = value
        return sums

    around(patch, rows, learn_and_set)


class _Backwards(torch.autograd.Function):
    """The same forwards; backwards what `change` makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def bad_expert_gradient(row: int, patch: pytest.MonkeyPatch) -> None:
    """Only in what the row leaves in the last expert that it uses, which the last rank of a group holds."""
    dispatch, combine, spoiled = LocalDispatcher.dispatch, LocalDispatcher.combine, []

    def endless(grad_PD: Tensor) -> Tensor:
        return grad_PD.index_fill(0, torch.tensor(len(grad_PD) - 1), torch.inf)

    def dispatch_without_way_back(self: LocalDispatcher, *given: Any) -> Dispatched:
        sent = dispatch(self, *given)
        if not spoiled:
            return sent
        x_PD, weight_P = (_Backwards.apply(x, torch.zeros_like) for x in (sent.x_PD, sent.weight_P))
        return replace(sent, x_PD=x_PD, weight_P=weight_P)

    def combine_spoiled(self: LocalDispatcher, y_PD: Tensor, *rest: Any) -> Tensor:
        return combine(self, _Backwards.apply(y_PD, endless) if spoiled else y_PD, *rest)

    def learn_spoiled(learn: Learn, model: nn.Module) -> RowSums:
        spoiled.append(True)
        try:
            return learn()
        finally:
            spoiled.clear()

    patch.setattr(LocalDispatcher, "dispatch", dispatch_without_way_back)
    patch.setattr(LocalDispatcher, "combine", combine_spoiled)
    around(patch, [row], learn_spoiled)


FAULTS: Mapping[str, Sequence[Plant]] = {
    "loss": [partial(bad_loss, 3)],
    "loss of a row whose round has no other": [partial(bad_loss, 4)],
    "activations": [partial(bad_activations, 1)],
    "gradient": [partial(gradient, [2], torch.inf)],
    "gradient too large for any sum": [partial(gradient, [3], 1e5)],
    "gradient of experts": [partial(bad_expert_gradient, 2)],
    "two losses": [partial(bad_loss, 4), partial(bad_loss, 1)],
    "gradient of experts held by ranks whose own rows are bad": [
        partial(bad_expert_gradient, 0),
        *(partial(bad_loss, row) for row in (1, 2, 3)),
    ],
    "sum that could overflow on two ranks": [partial(gradient, [0, 1], 1e4)],
    "sum that could overflow on one rank": [partial(gradient, [0, 2, 4], 8e3)],
}
ROWS = {"loss": 4, "loss of a row whose round has no other": 5, "activations": 2, "gradient": 3} | {
    "gradient too large for any sum": 4,
    "gradient of experts": 3,
    "two losses": 2,
    "gradient of experts held by ranks whose own rows are bad": 1,
}
"""The row that is named, counted from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """By fault: what the step raised, and what it changed; then the steps, the faulty one again without faults."""

    errors: dict[str, str]
    changed: dict[str, list[str]]
    steps: Steps


def take_with_faults(mesh: Mesh, world: World) -> Told:
    """The steps of CASE; before STEP is taken it is tried with each fault."""
    built, figures = ranks.built_of(CASE, mesh, world), []
    errors, changed = {}, {}
    for number in range(len(CASE.rows)):
        for name, plants in FAULTS.items() if number == STEP else ():
            before = ranks.parts_of(built)
            with pytest.MonkeyPatch.context() as patch:
                for plant in plants:
                    plant(patch)
                with pytest.raises(ArithmeticError) as raised:
                    ranks.step_of(built, CASE, number)
            errors[name] = f"{raised.type.__name__}: {raised.value}"
            after = ranks.parts_of(built)
            changed[name] = [key for key in before if not ranks.same_bits(before[key], after[key])]
        figures.append(ranks.figures_of(ranks.step_of(built, CASE, number)))
    return Told(errors=errors, changed=changed, steps=ranks.steps_of(built, figures))


def take_with_faults_there(rank: int, folder: Path, mesh: Mesh) -> None:
    world = start(mesh, ranks.placement(rank, mesh.size, folder), ranks.CPU)
    torch.save(take_with_faults(mesh, world), folder / f"{rank}.pt")
    world.close()


@pytest.fixture(scope="module")
def told_alone() -> Told:
    return take_with_faults(Mesh(), ALONE)


def test_one_process_names_the_row(told_alone: Told) -> None:
    found = {name: re.match(r"NonFinite: step 3, row (\d) of 5: ", text) for name, text in told_alone.errors.items()}
    assert {name: int(match[1]) for name, match in found.items() if match} == ROWS
    assert {name for name, match in found.items() if not match} == {name for name in FAULTS if "overflow" in name}
    assert not any(told_alone.changed.values())


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=4, expert=2, owners=2),
        pytest.param(Mesh(data=2, owners=2), marks=pytest.mark.slow),
        pytest.param(Mesh(data=2, expert=2, owners=2), marks=pytest.mark.slow),
        pytest.param(Mesh(data=4, expert=4, owners=4), marks=pytest.mark.slow),
    ],
    ids=sessions.name,
)
def test_all_ranks_name_the_same_row_change_nothing_and_go_on(
    mesh: Mesh, told_alone: Told, processes: BaseContext, tmp_path: Path
) -> None:
    ranks.spawn(processes, take_with_faults_there, mesh.size, tmp_path, mesh)
    told: list[Told] = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(mesh.size)]
    assert all(one.errors == told[0].errors for one in told), "ranks raise different errors"
    assert not [changed for one in told for changed in one.changed.values() if changed]
    # Which gradient is named first depends on who has it; a loss, and the row, are the same.
    assert {name: shown(text) for name, text in told[0].errors.items()} == {
        name: shown(text) for name, text in told_alone.errors.items()
    }
    alone, many = ranks.together([told_alone.steps]), ranks.together([one.steps for one in told])
    assert ranks.differences(alone, many) == []


def shown(error: str) -> str:
    return re.sub(r"(of 5: gradient ).*", r"\1", error)


# a whole run


def bad_losses_of_rank_1(patch: pytest.MonkeyPatch) -> None:
    """In step 7, which has three rows."""
    take, sums = loop.train_step, rows.sums

    def take_spoiled(parts: Parts, plan: StepPlan, *rest: Any, **options: Any) -> StepResult | None:
        if plan.step + 1 == 7 and parts.world.rank == 1:
            patch.setattr(rows, "sums", lambda *given: replace(sums(*given), lm=BAD))
        return take(parts, plan, *rest, **options)

    patch.setattr(loop, "train_step", take_spoiled)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=2, expert=2, owners=2),
        pytest.param(Mesh(data=3, owners=3), marks=pytest.mark.slow),
        pytest.param(Mesh(pipe=2, data=2, owners=2), marks=pytest.mark.slow),
    ],
    ids=sessions.name,
)
def test_a_run_ends_on_all_ranks_and_goes_on_with_others(
    mesh: Mesh, processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    session = Session(processes, sessions.config(corpus, tmp_path / "runs", mesh), plant=bad_losses_of_rank_1)
    assert session.wait() == [1] * mesh.size, session.said()
    assert "keel: error: step 7, row 2 of 3" in session.said()
    run = tiny.only_run(session.runs_dir)
    end = run.history()[-1]
    assert (end["event"], end["step"]) == ("end", 6)
    assert end["reason"].startswith("NonFinite: step 7, row 2 of 3")
    session = Session(processes, sessions.config(corpus, session.runs_dir, sessions.ONE))
    assert session.wait() == [0], session.said()
    tiny.assert_same_run(run, run_alone)
