"""What does observing cost?

    python -m benchmarks.observe [--repetitions N] [KEY=VALUE ...]

Whole steps of the debug recipe (or of the given overrides) on its own data, one step of each attention stage: the
stage's last. Three kinds of step in turn: alone; with its row of metrics; watched closely, too. Then the seconds of the
row by itself, which differences of whole steps are too unsteady to show, and what observing comes to when a step is
watched every `observe.every_steps`. Writing the row, wandb and validation are not in it.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from benchmarks import report
from benchmarks.step import prepared, stages
from trainer.build import Built
from trainer.config import ObserveConfig
from trainer.observe import Observer
from trainer.schedule import StepPlan
from trainer.step import train_step
from trainer.validate import hold_out

KINDS = {"alone": None, "with its row": 0, "watched": 1}
"""Kinds of step: `observe.every_steps` of its observer."""


def main() -> None:
    """Print the seconds of the three kinds of step by stage, and what a row costs of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    built = prepared(given.overrides)
    every = built.config.observe.every_steps
    rows = [_row(built, plan, given.repetitions) for plan in stages(built)]
    shapes = f"recipe {built.config.name}, {built.config.threads} threads; medians of {given.repetitions} repetitions"
    print(report.heading("benchmarks.observe", shapes))
    print("\nmilliseconds of a step, row included; of the row by itself, of an unwatched step and of a watched one")
    print(
        f"share of a step alone: rows by themselves, and watching every {every} steps as the difference of whole steps"
    )
    print(report.table([("stage", "rows x tokens", *KINDS, "row", "watched row", "rows", "watching"), *rows]))


def _row(built: Built, plan: StepPlan, repetitions: int) -> tuple[str, ...]:
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def step(kind: str, observer: Observer | None) -> Callable[[], object]:
        def take() -> None:
            with observer.watching(plan) if observer else nullcontext([]) as passes:
                result = train_step(built.parts, plan, lambda: False)
            assert result is not None
            if observer:
                seconds[kind].append(report.timed(lambda: observer.row(plan, result, passes, step_s=1.0)))

        return take

    steps = {kind: step(kind, None if every is None else _observer(built, every)) for kind, every in KINDS.items()}
    for take in steps.values():
        take()
    alone, with_row, watched = report.interleaved(steps, repetitions).values()
    row, watched_row = (statistics.median(seconds[kind][1:]) for kind in ("with its row", "watched"))
    every = built.config.observe.every_steps
    times = [f"{1e3 * value:.1f}" for value in (alone, with_row, watched, row, watched_row)]
    shares = (row / alone, (watched - with_row) / every / alone if every else 0.0)
    return (plan.attention, f"{plan.rows} x {plan.row_length}", *times, *(f"{share:.2%}" for share in shares))


def _observer(built: Built, every: int) -> Observer:
    config = replace(built.config, observe=ObserveConfig(every_steps=every))
    return Observer(built=replace(built, config=config), held_out=hold_out(built.data, 1), product_rate=1.0)


if __name__ == "__main__":
    main()
