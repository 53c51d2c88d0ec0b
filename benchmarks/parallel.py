"""What does each axis cost, at equal work and on the same cores as one process? What do exact sums cost, what overlaps?

    python -m benchmarks.parallel [--rounds N] [--steps N] [--rows N] [KEY=VALUE ...]

The debug model (or that of the overrides) over made-up rows, sparse attention, two cores: one process with two threads,
then two processes in each layout. Every round runs all of them in turn; figures are medians over all steps of all
rounds but each process's first. "exchange" is what a rank waits for others between its last backward pass and the next
forward pass, "of it" the share of a step; "late" lets gradients leave only when all rows are done, which shows what
leaving by layer hides. Memory is the first rank's most. "stall" is how long training waits for a checkpoint, "save" how
long the checkpoint takes beside it.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import report
from data.batch import Batch
from launch.compose import compose
from trainer.build import build
from trainer.config import ParallelConfig, TrainConfig
from trainer.device import settle
from trainer.parallel.fast import FastSum
from trainer.parallel.placement import Placement
from trainer.parallel.world import start
from trainer.parity.scale import MadeUpRows
from trainer.schedule import StepPlan
from trainer.step import train_step
from trainer.writer import Writer

ROW_LENGTH = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One row of the table. late: gradients leave when all rows are done."""

    name: str
    data: int = 1
    expert: int = 1
    threads: int = 1
    reduction: str = "exact"
    dense: str = "fp32"
    late: bool = False

    @property
    def ranks(self) -> int:
        return self.data


LAYOUTS = (
    Layout(name="one process, 2 threads", threads=2),
    Layout(name="data 2, exact", data=2),
    Layout(name="data 2, expert 2, exact", data=2, expert=2),
    Layout(name="one process, fast", reduction="fast"),
    Layout(name="data 2, fast", data=2, reduction="fast"),
    Layout(name="data 2, fast, dense bf16", data=2, reduction="fast", dense="bf16"),
    Layout(name="data 2, fast, late", data=2, reduction="fast", late=True),
    Layout(name="data 2, expert 2, fast", data=2, expert=2, reduction="fast"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """`MadeUpRows` end to end until they have ROW_LENGTH tokens, documents kept apart."""

    made: MadeUpRows
    source_names: tuple[str, ...] = ("made up",)

    def rows(self, segment: int, first: int, count: int) -> Batch:
        pieces = ROW_LENGTH // self.made.rows(0, 0, 1).token_BT.shape[1]
        found = self.made.rows(segment, first * pieces, count * pieces)
        columns = {
            name: getattr(found, name).reshape(count, ROW_LENGTH) for name in Batch.__slots__ if name != "source_B"
        }
        return Batch(**columns, source_B=found.source_B[::pieces])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    config = compose(["device=cpu", *given.overrides]).config
    measured: dict[str, list[dict[str, Any]]] = {layout.name: [] for layout in LAYOUTS}
    for _ in range(given.rounds):
        for layout in LAYOUTS:
            measured[layout.name].append(_measure(config, layout, given.steps, given.rows))
    alone = _median(measured[LAYOUTS[0].name], "step")
    shapes = f"{config.name} model, {given.rows} rows of {ROW_LENGTH}, sparse, {config.precision.dtype}; "
    shapes += f"medians of {given.rounds} rounds of {given.steps - 1} steps"
    print(report.heading("benchmarks.parallel", shapes))
    print("\nmilliseconds of a step")
    heading = ("layout", "step", "of one", "forward", "backward", "sums", "exchange", "of it", "update", "MiB")
    print(report.table([heading, *(_row(layout, measured[layout.name], alone) for layout in LAYOUTS)]))
    print("\nmilliseconds of a checkpoint")
    rows = [(name, f"{_median(runs, 'stall'):.1f}", f"{_median(runs, 'save'):.0f}") for name, runs in measured.items()]
    print(report.table([("layout", "stall", "save"), *rows]))


def _row(layout: Layout, runs: list[dict[str, Any]], alone_s: float) -> tuple[str, ...]:
    step, exchange = _median(runs, "step"), _median(runs, "exchange")
    parts = [f"{_median(runs, part):.0f}" for part in ("forward", "backward", "reduce")]
    memory = statistics.median(run["mib"] for run in runs)
    return (
        layout.name, f"{step:.0f}", f"{step / alone_s:.2f}", *parts, f"{exchange:.1f}", f"{exchange / step:.1%}",
        f"{_median(runs, 'update'):.0f}", f"{memory:.0f}",
    )  # fmt: skip


def _median(runs: list[dict[str, Any]], part: str) -> float:
    """Milliseconds."""
    return 1e3 * statistics.median(value for run in runs for value in run[part])


def _measure(config: TrainConfig, layout: Layout, steps: int, rows: int) -> dict[str, Any]:
    """What rank 0 of a layout tells; every rank is a process of its own."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(target=_rank, args=(rank, Path(folder), config, layout, steps, rows))
            for rank in range(layout.ranks)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert all(child.exitcode == 0 for child in children), layout.name
        return json.loads((Path(folder) / "told.json").read_text())


def _rank(rank: int, folder: Path, config: TrainConfig, layout: Layout, steps: int, rows: int) -> None:
    parallel = ParallelConfig(
        data=layout.data,
        expert=layout.expert,
        reduction=layout.reduction,
        dense_reduction=layout.dense,  # pyrefly: ignore
    )
    config = replace(config, parallel=parallel, threads=layout.threads)
    if layout.late:
        FastSum._complete = lambda self: iter(())
    device = settle(config)
    place = Placement(rank=rank, size=layout.ranks, local_rank=rank, address=f"file://{folder / 'meet'}")
    world = start(parallel.mesh, place, device)
    built = build(config, SimpleNamespace(train=Rows(made=MadeUpRows(seed=1))), device, world)  # pyrefly: ignore
    told: dict[str, list[float]] = {
        name: [] for name in ("step", "forward", "backward", "reduce", "exchange", "update")
    }
    for number in range(steps):
        world.gather(None)
        began = time.perf_counter()
        result = train_step(built.parts, plan_of(number, rows), lambda: False)
        assert result is not None
        if number:
            told["step"].append(time.perf_counter() - began)
            for name, seconds in asdict(result.seconds).items():
                if name in told:
                    told[name].append(seconds)
    told |= _checkpoint(built, world, folder)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if rank == 0:
        (folder / "told.json").write_text(json.dumps(told | {"mib": mib}))
    world.close()


def _checkpoint(built: Any, world: Any, folder: Path) -> dict[str, list[float]]:
    """Seconds that two checkpoints take, the first of which makes the buffers of the second."""
    built.parts.handout.settle()
    writer = Writer(folder / "checkpoints", 2, 0, world.saving)
    times = []
    for step in (1, 2):
        world.gather(None)
        stall = report.timed(lambda step=step: writer.submit(step, built.pieces(), {}))
        times.append((stall, stall + report.timed(writer.wait)))
    writer.close()
    return {"stall": [times[1][0]], "save": [times[1][1]]}


def plan_of(number: int, rows: int) -> StepPlan:
    """Step `number` of so many rows, all trained, attention sparse."""
    return StepPlan(
        step=number, tokens=0, rows=rows, row_length=ROW_LENGTH, segment=0, first_row=number * rows, rate=1e-3,
        attention="sparse", mtp_weight=0.3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
