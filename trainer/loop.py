"""The loop: when to step, measure, save, report and stop."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer import metrics
from trainer.build import Built
from trainer.debug.profile import Profiler
from trainer.folder import RunFolder
from trainer.guard import Guard
from trainer.observe import Observer
from trainer.progress import Progress
from trainer.step import train_step
from trainer.stop import Stop
from trainer.tracking import Tracker
from trainer.writer import Writer


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlets:
    """Where a loop's results go. progress: None where nobody looks. facts: what every checkpoint says of its origin."""

    folder: RunFolder
    writer: Writer
    tracker: Tracker
    progress: Progress | None
    profiler: Profiler
    facts: Mapping[str, Any]


def run_steps(built: Built, outlets: Outlets, observer: Observer, first_step: int, stop: Stop, stop_at: int) -> int:
    """Train from step `first_step` to `stop_at` or the end, or until `stop()`; saves at the end; returns the step.

    A step that was interrupted leaves nothing behind, so the checkpoint is of the last whole one.
    """
    begun, done, saved, save_s = time.perf_counter(), first_step, first_step, 0.0
    last, world = min(stop_at, len(built.plans)), built.parts.world
    # Many ranks stop together, between two steps; one process also between two rows.
    stopped = stop if world.size == 1 else (lambda: False)
    guard = Guard(built.parts, built.config.parallel.check_every_steps)
    guard.begin(first_step)
    while done < last and not stop.among(world):
        plan = built.plans[done]
        outlets.profiler.before(done + 1)
        started = time.perf_counter()
        world.beat.step(done + 1, plan.rows)
        with observer.watching(plan) as passes:
            result = train_step(built.parts, plan, stopped, guard.before_update)
        if result is None:
            break
        done += 1
        saves = done % built.config.checkpoint.every_steps == 0
        guard.after_step(done, saves=saves or done == last)
        seconds = time.perf_counter() - started
        outlets.profiler.after(done)
        observed = time.perf_counter()
        row = observer.row(plan, result, passes, seconds) | {"time/check_s": guard.seconds(), "time/save_s": save_s}
        row["time/observe_s"] = time.perf_counter() - observed
        if done == first_step + 1:
            row["speed/product_flops_per_s"] = observer.product_rate
        row["time/run_s"] = time.perf_counter() - begun
        if done % built.config.validation.every_steps == 0 or done == len(built.plans):
            built.parts.handout.settle()
            world.beat.mark("validation", row=None)
            row |= observer.held_out.measure(built.parts.pool, plan.attention, world, built.parts.pipeline)
            row["time/validation_s"] = time.perf_counter() - begun - row["time/run_s"]
        _emit(outlets, row)
        save_s = 0.0
        if saves:
            started = time.perf_counter()
            save(built, outlets, guard, done)
            saved, save_s = done, time.perf_counter() - started
    if done > saved:
        save(built, outlets, guard, done)
    return done


def save(built: Built, outlets: Outlets, guard: Guard, done: int) -> None:
    """Hand the state after `done` steps to the writer; its tensors and a JSON state are all that a resume needs."""
    built.parts.world.beat.mark("saving", row=None)
    built.parts.handout.settle()
    guard.before_save(done)
    outlets.folder.sync_metrics()
    outlets.writer.submit(done, built.pieces(), {"step": done, "facts": dict(outlets.facts)})


def _emit(outlets: Outlets, row: dict[str, Any]) -> None:
    assert all(metrics.is_known(name) for name in row), set(row) - set(metrics.METRICS)
    outlets.folder.append_metrics(row)
    outlets.tracker.log(row["step"], metrics.scalars(row))
    if outlets.progress is not None:
        outlets.progress.step(row)
