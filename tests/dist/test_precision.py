"""Proves that FP8 and FP4 have the bits of one process on any layout, after a save, across a turn to FP4.

What turns are the experts, the indexer's q and k, keys and entries.
"""

from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch

from tests.dist import ranks, sessions
from tests.dist.ranks import LENGTH, Case, Steps
from tests.trainer.precision.recipes import recipe
from trainer.parallel.mesh import Mesh
from trainer.precision.config import PrecisionConfig, RoundingConfig

Alone = Callable[[Case], Steps]
ROWS = (4, 3, 5, 1, 4, 2, 7)
TURN = LENGTH * 13  # after the fourth step, in the indexer's warm-up, which leaves the experts alone
DATA_3, EXPERT_2 = Mesh(data=3, owners=3), Mesh(data=2, expert=2, owners=2)
BOTH, PIPE_2 = Mesh(data=4, expert=2, owners=4), Mesh(pipe=2)
ALL = Mesh(pipe=2, data=2, expert=2, owners=2)


def case(precision: PrecisionConfig) -> Case:
    return Case(rows=ROWS, dtype="bf16", changes={"precision": precision})


def turning(tokens: int) -> PrecisionConfig:
    """FP8, and all that can be in FP4 or rounded from so many tokens on."""
    index, entries = (RoundingConfig(format=name, from_tokens=tokens) for name in ("e2m1_1x32", "e4m3_1x64"))
    return replace(recipe("fp8_fp4", "bf16", tokens), index=index, entries=entries)


FP8, FP4, TURNING = case(recipe("fp8")), case(recipe("fp8_fp4")), case(turning(TURN))
RECIPES = {"fp8": FP8, "fp8_fp4": FP4, "turning": TURNING, "mxfp8": case(recipe("mxfp8"))}


def layout(value: object) -> str | None:
    return sessions.name(value) if isinstance(value, Mesh) else None


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("mesh", [DATA_3, EXPERT_2, PIPE_2, BOTH, ALL], ids=layout)
def test_the_bits_of_one_process(name: str, mesh: Mesh, processes: BaseContext, alone: Alone, tmp_path: Path) -> None:
    """Every figure, weight, master and momentum of a recipe on a layout is that of one process."""
    assert ranks.differences(alone(RECIPES[name]), ranks.run(processes, RECIPES[name], mesh, tmp_path)) == []


@pytest.mark.parametrize("saved_after", [2, 4, 5])
def test_a_save_before_at_and_after_the_turn(
    saved_after: int, processes: BaseContext, alone: Alone, tmp_path: Path
) -> None:
    """Saved, built afresh and restored on two ranks, then on: the bits of steps without a break."""
    saved = replace(TURNING, saved_after=saved_after)
    assert ranks.differences(alone(TURNING), ranks.run(processes, saved, EXPERT_2, tmp_path)) == []


def test_recipes_differ(alone: Alone) -> None:
    """What is compared is not all the same: each recipe leaves other weights, the turn is FP8 before it."""
    plain = alone(Case(rows=ROWS, dtype="bf16"))
    found = {"bf16": plain} | {name: alone(of) for name, of in RECIPES.items()}
    weights = {name: steps.tensors["model/layers.1.ffn.experts.w1"] for name, steps in found.items()}
    assert all(not torch.equal(weights[one], weights[other]) for one in weights for other in weights if one < other)
    losses = {name: [told["loss/lm"] for told in steps.figures] for name, steps in found.items()}
    assert losses["turning"][:4] == losses["fp8"][:4]
    assert losses["turning"][4] != losses["fp8"][4]
