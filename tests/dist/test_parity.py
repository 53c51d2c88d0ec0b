"""Proves that steps and runs on many ranks have the bits of one process: each figure, each row, each tensor by name."""

from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.config import OptimConfig
from tests.dist import ranks, sessions
from tests.dist.ranks import Case, Steps
from tests.runs import tiny
from trainer.folder import RunFolder
from trainer.parallel.mesh import Mesh

Alone = Callable[[Case], Steps]
FP32, BF16, FP64 = (Case(dtype=dtype) for dtype in ("fp32", "bf16", "fp64"))
DATA_2, DATA_3, DATA_4 = (Mesh(data=data, owners=data) for data in (2, 3, 4))
EXPERT_2, EXPERT_4 = Mesh(data=2, expert=2, owners=2), Mesh(data=4, expert=4, owners=4)
BOTH, BOTH_2_OWNERS = Mesh(data=4, expert=2, owners=4), Mesh(data=4, expert=2, owners=2)
LONE_OWNERS = Mesh(data=3, owners=1)
EIGHT = (
    Mesh(data=8, owners=8),
    Mesh(data=8, expert=4, owners=8),
    Mesh(data=8, expert=4, owners=4),
    Mesh(data=8, expert=2, owners=4),
)
SHORT = (4, 3, 5)
"""One step of each attention mode."""


def short(**changes: Any) -> Case:
    return Case(rows=SHORT, changes=changes)


def no_mtp() -> Case:
    return short(model=ranks.model(num_nextn_predict_layers=0, compress_ratios=(4, 8)))


def all_hashed() -> Case:
    """No layer of the main model learns its routing; the MTP block does."""
    return short(model=ranks.model(num_hash_layers=2))


def frozen_and_scaled() -> Case:
    return short(optim=OptimConfig(freeze=("router", "norms"), rate_scale={"experts": 0.5, "embedding": 2.0}))


def clipped() -> Case:
    return short(optim=OptimConfig(clip_norm=1e-2))


def few_experts() -> Case:
    """As many experts as ranks: a rank holds one; a token has one."""
    return short(model=ranks.model(num_experts_per_tok=1))


def check(processes: BaseContext, alone: Alone, case: Case, mesh: Mesh, folder: Path, like: Case | None = None) -> None:
    """The steps on the mesh are those of one process; like: the case that one process takes, where it is another."""
    assert ranks.differences(alone(like or case), ranks.run(processes, case, mesh, folder)) == []


def ids(value: object) -> str | None:
    return sessions.name(value) if isinstance(value, Mesh) else value.dtype if isinstance(value, Case) else None


# steps


def test_one_process_sees_every_term_and_moves_every_tensor(alone: Alone) -> None:
    """What is compared: every loss, a clip that is active or is not, uneven loads, nothing that stands still."""
    steps = alone(FP32)
    always = {"loss/lm", "loss/mtp", "loss/balance", "optim/grad_norm", "optim/clip_scale", "router/load_LE"}
    assert all(always <= told.keys() for told in steps.figures)
    assert all("loss/indexer" in told for told in steps.figures[4:])
    assert {"optim/update_rms/experts", "optim/update_rms/indexer", "row 3/lm"} <= steps.figures[-1].keys()
    scales = [told["optim/clip_scale"] for told in steps.figures]
    assert min(scales) < max(scales) == 1
    assert all(len(set(load_E)) > 1 for load_E in steps.figures[0]["router/load_LE"])
    standing = {name for name, tensor in steps.tensors.items() if not tensor.any()}
    assert standing == set()
    first = ranks.take_alone(replace(FP32, rows=FP32.rows[:1]))
    same = [name for name, tensor in first.tensors.items() if torch.equal(tensor, steps.tensors[name])]
    assert same == ["model/layers.0.ffn.gate.tid2eid"]


@pytest.mark.parametrize(
    ("case", "mesh"),
    [(FP32, EXPERT_2), (FP32, DATA_3), (BF16, BOTH_2_OWNERS), pytest.param(FP64, BOTH, marks=pytest.mark.slow)],
    ids=ids,
)
def test_ten_steps(case: Case, mesh: Mesh, processes: BaseContext, alone: Alone, tmp_path: Path) -> None:
    check(processes, alone, case, mesh, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [FP32, BF16], ids=ids)
@pytest.mark.parametrize(
    "mesh",
    [DATA_2, DATA_3, DATA_4, EXPERT_2, EXPERT_4, BOTH, BOTH_2_OWNERS, LONE_OWNERS, Mesh(data=4, owners=2), *EIGHT],
    ids=ids,
)
def test_ten_steps_on_every_layout(
    case: Case, mesh: Mesh, processes: BaseContext, alone: Alone, tmp_path: Path
) -> None:
    check(processes, alone, case, mesh, tmp_path)


VARIANTS = {
    "no MTP": (no_mtp(), EXPERT_2),
    "all hashed": (all_hashed(), EXPERT_2),
    "frozen and scaled": (frozen_and_scaled(), BOTH_2_OWNERS),
    "always clipped": (clipped(), DATA_3),
    "one expert for a token": (few_experts(), EXPERT_4),
    "one row": (replace(FP32, rows=(1, 1, 1)), BOTH),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_and_optimizers(name: str, processes: BaseContext, alone: Alone, tmp_path: Path) -> None:
    check(processes, alone, *VARIANTS[name], tmp_path)


@pytest.mark.parametrize(
    ("what", "mesh"),
    [
        (("attention", "experts"), EXPERT_2),
        pytest.param(("attention",), EXPERT_2, marks=pytest.mark.slow),
        pytest.param(("experts",), BOTH, marks=pytest.mark.slow),
        pytest.param(("block",), EXPERT_2, marks=pytest.mark.slow),
        pytest.param(("block",), BOTH_2_OWNERS, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else sessions.name(value),
)
def test_computed_again(
    what: tuple[str, ...], mesh: Mesh, processes: BaseContext, alone: Alone, tmp_path: Path
) -> None:
    check(processes, alone, short(recompute=what), mesh, tmp_path, like=short())


@pytest.mark.parametrize("mesh", [DATA_2, pytest.param(DATA_3, marks=pytest.mark.slow)], ids=ids)
def test_rows_side_by_side_on_each_rank(mesh: Mesh, processes: BaseContext, alone: Alone, tmp_path: Path) -> None:
    check(processes, alone, short(threads=2), mesh, tmp_path, like=short())


# whole runs


def check_run(processes: BaseContext, corpus: Path, alone: RunFolder, mesh: Mesh, folder: Path, **changes: Any) -> None:
    """Rows of metrics, samples and the last checkpoint of a run on the mesh are those of one process."""
    config = sessions.config(corpus, folder / "runs", mesh, **changes)
    session = sessions.Session(processes, config)
    assert session.wait() == [0] * mesh.size, session.said()
    tiny.assert_same_run(tiny.only_run(session.runs_dir), alone)


def test_a_run(processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path) -> None:
    check_run(processes, corpus, run_alone, BOTH_2_OWNERS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*sessions.LAYOUTS, EIGHT[2]], ids=ids)
def test_a_run_on_every_layout(
    mesh: Mesh, processes: BaseContext, corpus: Path, run_alone: RunFolder, tmp_path: Path
) -> None:
    check_run(processes, corpus, run_alone, mesh, tmp_path)


@pytest.mark.slow
def test_a_run_in_bf16(processes: BaseContext, corpus: Path, tmp_path: Path) -> None:
    config = tiny.with_dtype(sessions.config(corpus, tmp_path / "alone" / "runs", sessions.ONE), "bf16")
    session = sessions.Session(processes, config)
    assert session.wait() == [0], session.said()
    alone = tiny.only_run(session.runs_dir)
    check_run(processes, corpus, alone, BOTH_2_OWNERS, tmp_path, precision=config.precision)
