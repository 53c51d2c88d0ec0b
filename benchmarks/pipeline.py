"""What do stages cost beside one process at equal work, and is the bubble the one that the schedule has?

    python -m benchmarks.pipeline [KEY=VALUE ...] [--rounds N] [--steps N] [--rows N ...]

The debug model with 8 layers (or the overrides') over made-up rows, sparse attention: one process with one thread and
with two, two data ranks, two pipe ranks on both schedules; every rank has one core. Every round runs all of them in
turn; figures are medians over the steps of all rounds but each process's first.

"passes" are the seconds of forward and backward passes and sums, all ranks together: the engine's cost at equal work is
what they are more than those of one process. A rank's bubble is the share of the time from the step's first pass to its
last in which it computes nothing: "measured" from the passes' own clocks, "simulated" by `trainer.parallel.simulate`
from the median times of each chunk's passes, with free transfers; "by FLOP" is what `keel plan` says from the
configuration alone. "order": whether the passes came in the order of `trainer.parallel.orders`. "MB sent": the most
that a rank handed to its neighbours in a step, in streams and their gradients, "planned": as `keel plan` counts them.
"MiB": by how much the process of a rank grew after building, at most.

The memory of a rank's tensors, those held throughout and the most at a time in a step, stands beside what `keel plan`
says. Every storage is followed for it from the first of the model on, which takes time: in processes of their own,
once. What runs on several threads is left out, for a plan counts one row at a time.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from benchmarks import report
from benchmarks.parallel import ROW_LENGTH, Rows, plan_of
from launch import device
from launch.compose import compose
from tests.trainer.peak import Peak
from trainer import plan_pipe
from trainer.build import Built, build
from trainer.config import TrainConfig
from trainer.device import settle
from trainer.parallel.orders import passes, training_order
from trainer.parallel.placement import Placement
from trainer.parallel.simulate import Profile, sends, simulate
from trainer.parallel.world import World, start
from trainer.parity.scale import MadeUpRows
from trainer.passes import Learning
from trainer.plan_parallel import layout
from trainer.plan_rows import stream_bytes
from trainer.step import train_step

DEEP = ("model.num_hidden_layers=8", "model.compress_ratios=[4,32,0,4,32,4,0,32,0]")
LAYOUTS = {
    "one process": "threads=1",
    "one process, 2 threads": "threads=2",
    "data 2": "threads=1 parallel.data=2",
    "pipe 2, 1f1b": "threads=1 parallel.pipe=2",
    "pipe 2, dualpipev": "threads=1 parallel.pipe=2 parallel.schedule=dualpipev",
}
Told = dict[str, Any]
Key = tuple[str, int]
"""A layout's name and the rows of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass by the clock of its rank, which is the machine's."""

    way: str
    row: int
    layer: int
    start: float
    end: float


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    device.prepare("cpu")
    configs = {
        name: compose(["device=cpu", *DEEP, *words.split(), *given.overrides]).config for name, words in LAYOUTS.items()
    }
    least = max(of.parallel.chunks * of.parallel.data for of in configs.values() if of.parallel.schedule == "dualpipev")
    if min(given.rows) < least:
        parser.error(f"--rows = {min(given.rows)}: expected at least {least}, so that DualPipeV has enough")
    measured = {(name, rows): list[list[Told]]() for rows in given.rows for name in configs}
    for _ in range(given.rounds):
        for name, rows in measured:
            measured[name, rows].append(_told(_steps_of_rank, configs[name], given.steps, rows))
    config = configs["one process"]
    shapes = f"{config.name} model with {config.model.num_hidden_layers} layers, rows of {ROW_LENGTH}, sparse, "
    shapes += f"{config.precision.dtype}; medians of {given.rounds} rounds of {given.steps - 1} steps"
    print(report.heading("benchmarks.pipeline", shapes))
    print("\nmilliseconds of a step; passes and their times: all ranks together")
    heading = (
        "layout", "rows", "step", "of one", "forward", "backward", "sums", "passes of one", "MB sent", "planned", "MiB"
    )  # fmt: skip
    print(report.table([heading, *(_costs(key, configs[key[0]], measured) for key in measured)]))
    print("\nshare of the passes' time in which ranks compute nothing, mean over ranks")
    staged = [key for key in measured if configs[key[0]].parallel.pipe > 1]
    heading = ("layout", "rows", "measured", "simulated", "by FLOP", "order")
    print(report.table([heading, *(_bubble(key, configs[key[0]], measured[key]) for key in staged)]))
    print("\nMiB of a rank's tensors")
    heading = ("layout", "rows", "rank", "held", "planned held", "most", "planned most", "of plan")
    alone = [(key, configs[key[0]]) for key in measured if configs[key[0]].threads == 1]
    print(report.table([heading, *(row for key, config in alone for row in _memory(key, config))]))


def _memory(key: Key, config: TrainConfig) -> list[tuple[str, ...]]:
    """By rank."""
    name, rows = key
    planned, found = layout(config, [plan_of(0, rows)]), _told(_memory_of_rank, config, rows)
    cells = []
    for rank, told in enumerate(found):
        memory = planned.role_of(rank).memory
        sizes = (told["held"], memory.held, told["most"], memory.total)
        mib = (f"{size / (1 << 20):.1f}" for size in sizes)
        cells.append((name, f"{rows}", f"{rank}", *mib, f"{told['most'] / memory.total:.3f}"))
    return cells


def _costs(key: Key, config: TrainConfig, measured: dict[Key, list[list[Told]]]) -> tuple[str, ...]:
    name, rows = key

    def of(layout: str, part: str) -> float:
        """Milliseconds, summed over ranks."""
        by_step = [[rank[part][step] for rank in run] for run in measured[layout, rows] for step in range(_steps(run))]
        return 1e3 * statistics.median(map(sum, by_step))

    def step(layout: str) -> float:
        return 1e3 * statistics.median(seconds for run in measured[layout, rows] for seconds in run[0]["step"])

    parts = ("forward", "backward", "reduce")
    # A process's parts are divided by its threads, which share the work of its two cores.
    shares = 2 if name.endswith("threads") else 1
    all_passes, of_one = (shares * sum(of(name, part) for part in parts), sum(of("one process", p) for p in parts))
    sent = statistics.median(max(rank["sent"] for rank in run) for run in measured[key]) / 1e6
    mib = statistics.median(max(rank["mib"] for rank in run) for run in measured[key])
    times = [f"{shares * of(name, part):.0f}" for part in parts]
    return (
        name, f"{rows}", f"{step(name):.0f}", f"{step(name) / step('one process'):.2f}", *times,
        f"{all_passes / of_one:.3f}", f"{sent:.2f}", f"{_planned_bytes(config, rows) / 1e6:.2f}", f"{mib:.0f}",
    )  # fmt: skip


def _planned_bytes(config: TrainConfig, rows: int) -> int:
    """The most that a rank sends in streams and their gradients."""
    parallel = config.parallel
    if parallel.pipe == 1:
        return 0
    orders = [training_order(parallel.schedule, parallel.pipe, rank, rows) for rank in range(parallel.pipe)]
    return max(sends(order).total() for order in orders) * stream_bytes(config, ROW_LENGTH)


def _steps(run: list[Told]) -> int:
    return len(run[0]["step"])


def _bubble(key: Key, config: TrainConfig, runs: Sequence[list[Told]]) -> tuple[str, ...]:
    name, rows = key
    by_step = [
        [[Pass(**one) for one in rank["passes"][step]] for rank in run] for run in runs for step in range(_steps(run))
    ]
    pipe, schedule = config.parallel.pipe, config.parallel.schedule
    orders = [training_order(schedule, pipe, rank, rows) for rank in range(pipe)]
    firsts = sorted({one.layer for ranks in by_step for rank in ranks for one in rank})

    def median(way: str, layer: int) -> float:
        found = (one for ranks in by_step for rank in ranks for one in rank if (one.way, one.layer) == (way, layer))
        return statistics.median(one.end - one.start for one in found)

    ways = {way: tuple(median(way, layer) for layer in firsts) for way in ("forward", "backward")}
    kept = all(
        [(one.way, one.row, firsts.index(one.layer)) for one in done]
        == [(action.way, action.row, action.chunk) for action in passes(order)]
        for ranks in by_step
        for done, order in zip(ranks, orders, strict=True)
    )
    planned = plan_pipe.play(config, plan_of(0, rows), rows)
    return (
        name, f"{rows}", f"{statistics.median(map(_idle, by_step)):.1%}",
        f"{simulate(orders, Profile(**ways)).bubble:.1%}", f"{planned.bubble:.1%}", "kept" if kept else "another",
    )  # fmt: skip


def _idle(ranks: Sequence[Sequence[Pass]]) -> float:
    """Of one step."""
    begin, end = min(one.start for rank in ranks for one in rank), max(one.end for rank in ranks for one in rank)
    busy = sum(one.end - one.start for rank in ranks for one in rank)
    return 1 - busy / (len(ranks) * (end - begin))


def _told(target: Callable[..., None], config: TrainConfig, *given: int) -> list[Told]:
    """What the ranks of a layout tell by `target(rank, folder, config, *given)`; each is a process of its own."""
    context, size = multiprocessing.get_context("spawn"), config.parallel.mesh.size
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=target, args=(rank, Path(folder), config, *given)) for rank in range(size)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert all(child.exitcode == 0 for child in children), config.parallel
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def _world(rank: int, folder: Path, config: TrainConfig) -> World:
    place = Placement(rank=rank, size=config.parallel.mesh.size, local_rank=rank, address=f"file://{folder / 'meet'}")
    return start(config.parallel.mesh, place, settle(config))


def _built(config: TrainConfig, world: World) -> Built:
    data = SimpleNamespace(train=Rows(made=MadeUpRows(seed=1)))
    return build(config, data, settle(config), world)  # pyrefly: ignore


def _memory_of_rank(rank: int, folder: Path, config: TrainConfig, rows: int) -> None:
    world = _world(rank, folder, config)
    with Peak() as peak:
        built = _built(config, world)
        held, peak.peak = peak.alive_bytes(), 0
        train_step(built.parts, plan_of(0, rows), lambda: False)
    (folder / f"{rank}.json").write_text(json.dumps({"held": held, "most": peak.peak}))
    world.close()


def _steps_of_rank(rank: int, folder: Path, config: TrainConfig, steps: int, rows: int) -> None:
    world = _world(rank, folder, config)
    built = _built(config, world)
    passes_of_step, sent = _watch_passes(), _watch_sends()
    before, told = _mib(), {name: [] for name in ("step", "forward", "backward", "reduce", "passes")}
    for number in range(steps):
        world.gather(None)
        passes_of_step.clear()
        sent[0] = 0
        began = time.perf_counter()
        result = train_step(built.parts, plan_of(number, rows), lambda: False)
        assert result is not None
        if number:
            told["step"].append(time.perf_counter() - began)
            told["passes"].append(list(passes_of_step))
            for part in ("forward", "backward", "reduce"):
                told[part].append(getattr(result.seconds, part))
    (folder / f"{rank}.json").write_text(json.dumps(told | {"sent": sent[0], "mib": _mib() - before}))
    world.close()


def _mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _watch_passes() -> list[dict[str, Any]]:
    """Where the passes of this rank's stage are noted from now on."""
    noted: list[dict[str, Any]] = []

    def timed(way: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Learning, turn: int, layers: range, given: Any) -> Any:
            begin = time.monotonic()
            found = method(self, turn, layers, given)
            noted.append({"way": way, "row": turn, "layer": layers.start, "start": begin, "end": time.monotonic()})
            return found

        return call

    for way in ("forward", "backward"):
        setattr(Learning, way, timed(way, getattr(Learning, way)))
    return noted


def _watch_sends() -> list[int]:
    """[bytes] of floats that this rank sends to another by itself, from now on."""
    total, send, batch = [0], dist.send, dist.batch_isend_irecv

    def counted(tensor: Any, *given: Any, **named: Any) -> Any:
        total[0] += tensor.nbytes * tensor.is_floating_point()
        return send(tensor, *given, **named)

    def batched(transfers: Any) -> Any:
        gone = [one.tensor for one in transfers if one.op.__name__ == "isend" and one.tensor.is_floating_point()]
        total[0] += sum(tensor.nbytes for tensor in gone)
        return batch(transfers)

    dist.send, dist.batch_isend_irecv = counted, batched
    return total


if __name__ == "__main__":
    main()
