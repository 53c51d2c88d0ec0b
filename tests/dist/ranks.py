"""Steps of the tiny model on several ranks, each a process of its own, and on one: what the tests compare.

A rank leaves its part of the weights, the state of what it owns and the figures of each step; `whole` puts the parts
together and refuses what two ranks tell differently.
"""

import math
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from model import names
from tests.runs import tiny
from tests.trainer import steps
from trainer import metrics
from trainer.build import Built, build
from trainer.config import ParallelConfig, TrainConfig
from trainer.parallel.mesh import Mesh
from trainer.parallel.placement import Placement
from trainer.parallel.world import ALONE, World, start
from trainer.schedule import StepPlan
from trainer.step import train_step

PATIENCE_S = 120
MODES = ("dense", "indexer_warmup", "sparse")
CPU = torch.device("cpu")
MODEL = tiny.model(moe_intermediate_size=32)
"""The tiny model with experts as wide as expert parallelism asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Steps to take: rows of each, so that some rounds have ranks without one; changes: of the TrainConfig."""

    rows: tuple[int, ...] = (4, 3, 5, 1, 4, 2, 7, 4, 3, 4)
    dtype: str = "fp32"
    changes: Mapping[str, Any] = None  # pyrefly: ignore
    mistake: Callable[[], None] | None = None
    """Called in every process first: breaks something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What the steps left: figures by step; weights and state by whole name."""

    figures: list[dict[str, float]]
    tensors: dict[str, Tensor]


def config_of(case: Case, mesh: Mesh) -> TrainConfig:
    parallel = {"data": mesh.data, "expert": mesh.expert, "owners_limit": mesh.owners}
    changes = dict(case.changes or {})
    given = ParallelConfig(**(parallel | changes.pop("parallel", {})))
    return replace(
        tiny.with_dtype(tiny.config(Path("none"), Path("none"), model=MODEL, **changes), case.dtype), parallel=given
    )


def take(case: Case, mesh: Mesh, world: World) -> Steps:
    """All steps of a case on this rank; modes change within them, the batch is another each time."""
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    config = config_of(case, mesh)
    stream = SimpleNamespace(rows=None)
    built = build(config, SimpleNamespace(train=stream), CPU, world)
    figures = []
    for number, rows in enumerate(case.rows):
        stream.rows = steps.FixedStream(batch=steps.make_batch(seed=number, rows=rows, length=32)).rows
        result = train_step(built.parts, plan_of(number, rows, len(case.rows)), lambda: False)
        assert result is not None
        told = metrics.losses(result.rows, result.counts) | metrics.routing(result.rows, result.counts, result.load_LE)
        figures.append(told | {"optim/grad_norm": result.update.norm} | result.update.update_rms)
    built.parts.handout.settle()
    return Steps(figures=figures, tensors=parts_of(built))


def plan_of(number: int, rows: int, steps_in_all: int) -> StepPlan:
    plan = steps.make_plan(MODES[number * len(MODES) // steps_in_all])
    return replace(plan, step=number, rows=rows, row_length=32)


def parts_of(built: Built) -> dict[str, Tensor]:
    """Copies of what this rank holds and owns, with the rows it stands for: NAME[start:stop]."""
    ownership, found = built.parts.ownership, {}
    for name, tensor in names.tensors(built.parts.model).items():
        first = ownership.first_row(name)
        found[f"model/{name}[{first}:{first + len(tensor)}]"] = tensor
    keys = {ownership.key(span): span for span in ownership.spans}
    for name, tensor in built.parts.optimizer.state_dict().items():
        kind, _, key = name.partition("/")
        span = keys[key]
        rows = f"[{span.start}:{span.stop}]" if tensor.dim() else ""
        found[f"{kind}/{span.parameter}{rows}"] = tensor
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def whole(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' parts as whole tensors; what several hold must be the same bits, and no row may be missing."""
    rows: dict[str, dict[int, Tensor]] = {}
    for of_rank in parts:
        for label, tensor in of_rank.items():
            name, _, span = label.partition("[")
            first = int(span.partition(":")[0]) if span else 0
            for offset, row in enumerate(tensor if tensor.dim() else tensor.unsqueeze(0)):
                known = rows.setdefault(name, {}).setdefault(first + offset, row)
                assert torch.equal(known, row), f"{name}, row {first + offset}: ranks differ"
    for name, found in rows.items():
        assert sorted(found) == list(range(len(found))), f"{name}: rows are missing"
    return {name: torch.stack([found[row] for row in sorted(found)]) for name, found in rows.items()}


def run(processes: BaseContext, case: Case, mesh: Mesh, folder: Path) -> Steps:
    """The steps of a case on `mesh.size` ranks; what rank 0 tells, which all ranks must tell."""
    if mesh.size == 1:
        alone = take(case, mesh, ALONE)
        return replace(alone, tensors=whole([alone.tensors]))
    spawn(processes, _rank, mesh.size, folder, case, mesh)
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(mesh.size)]
    assert all(one.figures == found[0].figures for one in found), "ranks tell different figures"
    return Steps(figures=found[0].figures, tensors=whole([one.tensors for one in found]))


def spawn(processes: BaseContext, work: Callable[..., None], size: int, folder: Path, *arguments: Any) -> None:
    """work(rank, folder, *arguments) in `size` processes; AssertionError with what the first failing one said."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meet").unlink(missing_ok=True)
    children = [processes.Process(target=_guarded, args=(work, rank, folder, *arguments)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE_S)
    late = [rank for rank, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
        child.join()
    said = [path.read_text() for path in sorted(folder.glob("*.failed"))]
    assert not said, said[0]
    assert not late, f"ranks {late} did not end in {PATIENCE_S} s"
    assert [child.exitcode for child in children] == [0] * size


def placement(rank: int, size: int, folder: Path) -> Placement:
    return Placement(rank=rank, size=size, local_rank=rank, address=f"file://{folder / 'meet'}")


def _guarded(work: Callable[..., None], rank: int, folder: Path, *arguments: Any) -> None:
    try:
        work(rank, folder, *arguments)
    except BaseException:
        (folder / f"{rank}.failed").write_text(f"rank {rank}\n{traceback.format_exc()}")
        sys.exit(1)


def _rank(rank: int, folder: Path, case: Case, mesh: Mesh) -> None:
    if case.mistake is not None:
        case.mistake()
    world = start(mesh, placement(rank, mesh.size, folder), CPU)
    torch.save(take(case, mesh, world), folder / f"{rank}.pt")
    world.close()


def differences(left: Steps, right: Steps) -> list[str]:
    """What is not the same to the bit: figures by step and name, tensors by name."""
    found = []
    for step, (one, other) in enumerate(zip(left.figures, right.figures, strict=True)):
        for name in one.keys() | other.keys():
            if not _same(one.get(name), other.get(name)):
                found.append(f"step {step} {name}: {one.get(name)!r} and {other.get(name)!r}")
    both = left.tensors.keys() & right.tensors.keys()
    same = {name for name in both if same_bits(left.tensors[name], right.tensors[name])}
    return [*found, *sorted((left.tensors.keys() | right.tensors.keys()) - same)]


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in shape, type and every bit."""
    described = (left.shape, left.dtype) == (right.shape, right.dtype)
    return described and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def _same(left: float | None, right: float | None) -> bool:
    return left == right or (left is not None and right is not None and math.isnan(left) and math.isnan(right))


def context() -> BaseContext:
    """Children that start in milliseconds; see tests/runs/conftest.py."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["__main__", "tests.runs.children", "tests.dist.ranks"])
    return made


__all__ = ["Batch", "Case", "Steps", "context", "differences", "run", "spawn", "whole"]
