"""Where does the time of an optimizer step go, and what do more threads bring?

    python -m benchmarks.step [--repetitions N] [--threads N ...] [KEY=VALUE ...]

Whole steps of the debug recipe (or of the given overrides) on its own data, one step of each attention stage: the
stage's last. First on one thread, with a clock around each part; then the same step on each number of threads in turn.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks import report
from launch.compose import compose
from trainer import row
from trainer.build import Built, build, read_data
from trainer.config import TrainConfig
from trainer.device import settle
from trainer.schedule import StepPlan
from trainer.step import train_step

PARTS = ("data", "forward", "backward", "sums", "optimizer")


class Clock:
    """Seconds by part. A part that runs inside another is taken out of the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, part: str, inner: Callable[..., Any], *, inside: str | None = None) -> Callable[..., Any]:
        """`inner` with its time added to `part` and taken off `inside`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[part] += elapsed
                if inside is not None:
                    self.seconds[inside] -= elapsed

        return timed


def main() -> None:
    """Print the parts of a step by stage, then tokens per second by thread count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    built = {threads: prepared([*given.overrides, f"threads={threads}"]) for threads in sorted({1, *given.threads})}
    plans = stages(built[1])
    parts = [_parts(built[1], plan, given.repetitions) for plan in plans]
    speeds = [_speeds({n: built[n] for n in given.threads}, plan, given.repetitions) for plan in plans]
    rows = ", ".join(f"{plan.attention} {plan.rows} x {plan.row_length}" for plan in plans)
    shapes = f"recipe {built[1].config.name}; rows x tokens: {rows}; medians of {given.repetitions} repetitions"
    print(report.heading("benchmarks.step", shapes))
    print("\nmilliseconds on one thread; forward has the losses, sums the exact addition; what is left is not shown")
    print(report.table([("stage", *PARTS, "step"), *parts]))
    print("\ntokens per second by number of threads")
    print(report.table([("stage", *(f"{threads}" for threads in given.threads)), *speeds]))


def prepared(overrides: Sequence[str]) -> Built:
    """The parts of a run on this machine's CPU: the debug recipe with these overrides."""
    config: TrainConfig = compose(["device=cpu", *overrides]).config
    device = settle(config)
    return build(config, read_data(config, lambda line: None), device)


def stages(built: Built) -> list[StepPlan]:
    """The last step of each attention stage, in order."""
    return list({plan.attention: plan for plan in built.plans}.values())


@contextmanager
def _clocked(built: Built) -> Iterator[Clock]:
    clock, parts = Clock(), built.parts
    with (
        mock.patch.object(parts.stream, "rows", clock.around("data", parts.stream.rows)),
        mock.patch.object(row, "learn", clock.around("forward", row.learn)),
        mock.patch.object(row, "learn_indexer", clock.around("forward", row.learn_indexer)),
        mock.patch.object(Tensor, "backward", clock.around("backward", Tensor.backward, inside="forward")),
        mock.patch.object(parts.sums, "add", clock.around("sums", parts.sums.add)),
        mock.patch.object(parts.sums, "finish", clock.around("sums", parts.sums.finish)),
        mock.patch.object(parts.optimizer, "step", clock.around("optimizer", parts.optimizer.step)),
    ):
        yield clock


def _parts(built: Built, plan: StepPlan, repetitions: int) -> tuple[str, ...]:
    found: list[dict[str, float]] = []
    train_step(built.parts, plan, lambda: False)
    for _ in range(repetitions):
        with _clocked(built) as clock:
            step_s = report.timed(lambda: train_step(built.parts, plan, lambda: False))
        found.append(clock.seconds | {"step": step_s})
    medians = [statistics.median(one[part] for one in found) for part in (*PARTS, "step")]
    return (plan.attention, *(f"{seconds * 1e3:.0f}" for seconds in medians))


def _speeds(built: dict[int, Built], plan: StepPlan, repetitions: int) -> tuple[str, ...]:
    actions = {f"{n}": lambda parts=one.parts: train_step(parts, plan, lambda: False) for n, one in built.items()}
    for action in actions.values():
        action()
    seconds = report.interleaved(actions, repetitions)
    return (plan.attention, *(f"{plan.rows * plan.row_length / one:,.0f}" for one in seconds.values()))


if __name__ == "__main__":
    main()
