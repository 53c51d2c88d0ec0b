"""Steps of a tiny model on several ranks, each a process of its own, and on one: what the tests compare.

A rank leaves its part of the weights, the state of what it owns and the figures of each step; `run` puts the parts
together and tells where two ranks differ.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import names
from model.config import ModelConfig
from tests.runs import tiny
from tests.trainer import steps
from tests.trainer.checkpoint_samples import same_bits
from trainer import checkpoint, metrics
from trainer.build import Built, build
from trainer.config import ParallelConfig, TrainConfig
from trainer.device import settle
from trainer.parallel.mesh import Mesh
from trainer.parallel.placement import Placement
from trainer.parallel.world import ALONE, World, start
from trainer.schedule import StepPlan
from trainer.schedule_config import BatchConfig
from trainer.step import StepResult, train_step

PATIENCE_S = 120
LENGTH = 32
MODES = ("dense", "indexer_warmup", "sparse")
CPU = torch.device("cpu")
Plant = Callable[[pytest.MonkeyPatch], None]


def model(**changes: Any) -> ModelConfig:
    """The tiny model with experts as wide as expert ranks ask for, and three for a token: a sum that has an order."""
    return tiny.model(**({"moe_intermediate_size": 32, "num_experts_per_tok": 3} | changes))


MODEL = model()
SCHEDULE = tiny.schedule(batch=BatchConfig(tokens=32 * 48, start_tokens=32 * 48), indexer_warmup_batch_tokens=None)
"""That of no case, whose steps have rows of their own; it has as many as DualPipeV asks of a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Steps to take: rows of each, so that some rounds have ranks without one; changes: of the TrainConfig.

    saved_after: after so many steps all is saved, built afresh and restored, on many ranks.
    plant: called in every process of many ranks first; breaks something there.
    """

    rows: tuple[int, ...] = (4, 3, 5, 1, 4, 2, 7, 4, 3, 4)
    dtype: str = "fp32"
    changes: Mapping[str, Any] = field(default_factory=dict)
    saved_after: int = 0
    plant: Plant | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What the steps left: figures by step; weights and state by whole name; torn: what two ranks tell differently."""

    figures: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    torn: list[str] = field(default_factory=list)


class RankFailed(Exception):
    """A process ended with an error: never what a test looks for, so that no mistake is seen by its own breakage."""


def config_of(case: Case, mesh: Mesh) -> TrainConfig:
    parallel = {"pipe": mesh.pipe, "data": mesh.data, "expert": mesh.expert, "owners_limit": mesh.owners}
    changes = {"model": MODEL, "schedule": SCHEDULE} | dict(case.changes)
    given = ParallelConfig(**(parallel | changes.pop("parallel", {})))
    return replace(tiny.with_dtype(tiny.config(Path("none"), Path("none"), **changes), case.dtype), parallel=given)


def built_of(case: Case, mesh: Mesh, world: World) -> Built:
    """This rank's part of the case, before its first step."""
    config = config_of(case, mesh)
    settle(config)
    return build(config, SimpleNamespace(train=SimpleNamespace(rows=None)), CPU, world)


def step_of(built: Built, case: Case, number: int) -> StepResult:
    """Step `number` of a case; the batch is another each time, the attention mode changes."""
    built.parts.stream.rows = rows_of_step(number, case.rows[number]).rows
    result = train_step(built.parts, plan_of(number, case), lambda: False)
    assert result is not None
    return result


def take(case: Case, mesh: Mesh, world: World, folder: Path = Path("none")) -> Steps:
    """All steps of a case on this rank."""
    built, figures = built_of(case, mesh, world), []
    for number in range(len(case.rows)):
        figures.append(figures_of(step_of(built, case, number)))
        if number + 1 == case.saved_after and mesh.size > 1:
            checkpoint.save(folder / "saved", number + 1, built.pieces(), {}, world.saving)
            built = built_of(case, mesh, world)
            built.restore(checkpoint.recover(folder / "saved", print, world.control))
            built.parts.precision.enter(LENGTH * sum(case.rows[: number + 1]))
    return steps_of(built, figures)


def steps_of(built: Built, figures: list[dict[str, Any]]) -> Steps:
    """What this rank has after the steps that told these figures."""
    built.parts.handout.settle()
    return Steps(figures=figures, tensors=parts_of(built))


def rows_of_step(number: int, rows: int) -> steps.FixedStream:
    """The rows of a step, of a length each."""
    return steps.FixedStream(batch=steps.make_batch(seed=number, rows=rows, length=LENGTH))


def plan_of(number: int, case: Case) -> StepPlan:
    """Dense, warm-up and sparse steps, with another rate each."""
    plan = steps.make_plan(MODES[number * len(MODES) // len(case.rows)], rate=1e-2 / (1 + number))
    return replace(
        plan, step=number, rows=case.rows[number], row_length=LENGTH, tokens=LENGTH * sum(case.rows[:number])
    )


def figures_of(result: StepResult) -> dict[str, Any]:
    """Every number that a step tells: of the step, and of each of its rows."""
    told = metrics.losses(result.rows, result.counts) | metrics.routing(result.rows, result.counts, result.load_LE)
    told |= {"router/load_LE": result.load_LE.tolist(), "counts": result.counts}
    told |= {"optim/grad_norm": result.update.norm, "optim/clip_scale": result.update.clip_scale}
    told |= {f"optim/update_rms/{group}": rms for group, rms in result.update.update_rms.items()}
    parts = ("lm", "mtp", "balance_L", "indexer_L", "entropy_L", "targets")
    return told | {f"row {row}/{part}": getattr(of, part) for row, of in enumerate(result.rows) for part in parts}


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


def whole(parts: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], list[str]]:
    """The ranks' parts as whole tensors, and where several that hold the same row differ; no row may be missing."""
    rows: dict[str, dict[int, Tensor]] = {}
    torn = {}
    for rank, of_rank in enumerate(parts):
        for label, tensor in of_rank.items():
            name, _, span = label.partition("[")
            first = int(span.partition(":")[0]) if span else 0
            for offset, row in enumerate(tensor if tensor.dim() else tensor.unsqueeze(0)):
                known = rows.setdefault(name, {}).setdefault(first + offset, row)
                if not same_bits(known, row):
                    torn.setdefault(name, f"{name}: not the same on rank {rank}, in row {first + offset} first")
    for name, found in rows.items():
        assert sorted(found) == list(range(len(found))), f"{name}: rows are missing"
    return {name: torch.stack([of[row] for row in sorted(of)]) for name, of in rows.items()}, list(torn.values())


def take_alone(case: Case) -> Steps:
    """The steps of a case on one process."""
    return together([take(case, Mesh(), ALONE)])


def run(processes: BaseContext, case: Case, mesh: Mesh, folder: Path) -> Steps:
    """The steps of a case on `mesh.size` ranks, or here, where that is one."""
    if mesh.size == 1:
        return take_alone(case)
    spawn(processes, _rank, mesh.size, folder, case, mesh)
    return together([torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(mesh.size)])


def together(found: Sequence[Steps]) -> Steps:
    """What the ranks' steps left, as one."""
    tensors, torn = whole([one.tensors for one in found])
    told = [
        f"{line}: not the same on rank {rank}"
        for rank, one in enumerate(found)
        for line in different_figures(found[0], one)
    ]
    return Steps(figures=found[0].figures, tensors=tensors, torn=[*told, *torn])


def spawn(processes: BaseContext, work: Callable[..., None], size: int, folder: Path, *arguments: Any) -> None:
    """work(rank, folder, *arguments) in `size` processes; RankFailed with what the first failing one said."""
    children = begin(processes, work, size, folder, *arguments)
    for child in children:
        child.join(PATIENCE_S)
    late = [rank for rank, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
        child.join()
    said = [path.read_text() for path in sorted(folder.glob("*.failed"))]
    if said or late:
        raise RankFailed("\n".join([f"ranks {late} did not end in {PATIENCE_S} s" if late else "", *said]))
    assert [child.exitcode for child in children] == [0] * size


def begin(
    processes: BaseContext, work: Callable[..., None], size: int, folder: Path, *arguments: Any
) -> list[BaseProcess]:
    """The processes, started; one that fails leaves its traceback in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meet").unlink(missing_ok=True)
    children = [processes.Process(target=_guarded, args=(work, rank, folder, *arguments)) for rank in range(size)]
    for child in children:
        child.start()
    return children


def placement(rank: int, size: int, folder: Path) -> Placement:
    return Placement(rank=rank, size=size, local_rank=rank, address=f"file://{folder / 'meet'}")


def _guarded(work: Callable[..., None], rank: int, folder: Path, *arguments: Any) -> None:
    try:
        work(rank, folder, *arguments)
    except Exception:
        (folder / f"{rank}.failed").write_text(f"rank {rank}\n{traceback.format_exc()}")
        sys.exit(1)


def _rank(rank: int, folder: Path, case: Case, mesh: Mesh) -> None:
    if case.plant is not None:
        case.plant(pytest.MonkeyPatch())
    world = start(mesh, placement(rank, mesh.size, folder), CPU)
    torch.save(take(case, mesh, world, folder), folder / f"{rank}.pt")
    world.close()


def differences(left: Steps, right: Steps) -> list[str]:
    """What is not the same to the bit: figures by step and name, tensors by name; what ranks told differently first."""
    both = left.tensors.keys() & right.tensors.keys()
    same = {name for name in both if same_bits(left.tensors[name], right.tensors[name])}
    different = sorted((left.tensors.keys() | right.tensors.keys()) - same)
    return [*left.torn, *right.torn, *different_figures(left, right), *different]


def different_figures(left: Steps, right: Steps) -> Iterator[str]:
    """What is not the same to the last digit, and in the same steps."""
    for step, (one, other) in enumerate(zip(left.figures, right.figures, strict=True)):
        for name in sorted(one.keys() | other.keys()):
            # As text: all digits of a number, and the sign of a zero; one that is none equals itself.
            if repr(one.get(name)) != repr(other.get(name)):
                yield f"step {step} {name}: {one.get(name)!r} and {other.get(name)!r}"
