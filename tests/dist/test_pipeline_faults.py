"""Proves that a number that is none on one stage ends the step on all, for the row one process names, undone."""

from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import Batch
from model.transformer import Transformer
from tests.dist import ranks, sessions
from tests.dist.ranks import Case
from trainer import row
from trainer.debug.fault import NonFinite
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import ALONE, World, start

CASE = Case(rows=(4, 3, 5))
STEP, ROW = 2, 3
Spoil = Callable[[row.Passed, Transformer], row.Passed]


def nan_loss(passed: row.Passed, model: Transformer) -> row.Passed:
    return replace(passed, mtp=passed.mtp * torch.nan) if model.is_last else passed


def nan_streams(passed: row.Passed, model: Transformer) -> row.Passed:
    """From the first layers on: every later stage computes with them; on one process they are in the losses at last."""
    if model.is_last:
        return replace(passed, lm=passed.lm * torch.nan)
    assert passed.end is not None
    return replace(passed, output=replace(passed.output, x_BTND=passed.end * torch.nan))


def infinite_gradient(passed: row.Passed, model: Transformer) -> row.Passed:
    """Where the first layer is: its weights', with losses that are numbers."""
    if model.is_first and passed.end is not None:
        passed.end.register_hook(lambda grad: grad * torch.inf)
    return passed


SPOILS: dict[str, Spoil] = {"loss": nan_loss, "streams": nan_streams, "gradient": infinite_gradient}


def spoil(patch: pytest.MonkeyPatch, how: Spoil) -> None:
    """How one row's forward pass ends, wherever a part of it runs."""
    forward, token_T = row.forward, ranks.rows_of_step(STEP, CASE.rows[STEP]).batch.token_BT[ROW]

    def forward_spoiled(model: Transformer, one: Batch, *rest: Any) -> row.Passed:
        passed = forward(model, one, *rest)
        return how(passed, model) if torch.equal(one.token_BT[0], token_T) else passed

    patch.setattr(row, "forward", forward_spoiled)


def take_with_faults(mesh: Mesh, world: World) -> tuple[dict[str, str], list[str], ranks.Steps]:
    """Errors by fault, names of what they changed, and the steps, of which the last is tried with each fault first."""
    built, figures, errors, changed = ranks.built_of(CASE, mesh, world), [], {}, []
    for number in range(len(CASE.rows)):
        for name, how in SPOILS.items() if number == STEP else ():
            before = ranks.parts_of(built)
            with pytest.MonkeyPatch.context() as patch:
                spoil(patch, how)
                with pytest.raises(NonFinite) as raised:
                    ranks.step_of(built, CASE, number)
            errors[name] = str(raised.value)
            changed += [key for key, tensor in ranks.parts_of(built).items() if not torch.equal(tensor, before[key])]
        figures.append(ranks.figures_of(ranks.step_of(built, CASE, number)))
    return errors, changed, ranks.steps_of(built, figures)


def take_there(rank: int, folder: Path, mesh: Mesh) -> None:
    world = start(mesh, ranks.placement(rank, mesh.size, folder), ranks.CPU)
    torch.save(take_with_faults(mesh, world), folder / f"{rank}.pt")
    world.close()


@pytest.mark.parametrize(
    "mesh",
    [Mesh(pipe=2), pytest.param(Mesh(pipe=2, data=2, expert=2, owners=2), marks=pytest.mark.slow)],
    ids=sessions.name,
)
def test_all_stages_name_the_same_row_change_nothing_and_go_on(
    mesh: Mesh, processes: BaseContext, tmp_path: Path
) -> None:
    of_one = take_with_faults(Mesh(), ALONE)
    ranks.spawn(processes, take_there, mesh.size, tmp_path, mesh)
    told = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(mesh.size)]
    assert [changed for _, changed, _ in (of_one, *told) if changed] == []
    assert all(errors == told[0][0] for errors, _, _ in told), "ranks raise different errors"
    assert {name: shown(text) for name, text in told[0][0].items()} == {
        name: shown(text) for name, text in of_one[0].items()
    }
    assert told[0][0]["gradient"].startswith("step 3, row 4 of 5: gradient ")
    assert ranks.differences(ranks.together([of_one[2]]), ranks.together([steps for _, _, steps in told])) == []


def shown(error: str) -> str:
    """Without the name of a gradient: which is named first depends on who has it."""
    return error.partition("gradient ")[0]
