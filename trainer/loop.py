"""The loop: when to step, measure, save, report and stop."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer import metrics
from trainer.build import Built
from trainer.folder import RunFolder
from trainer.progress import Progress
from trainer.schedule import StepPlan
from trainer.step import StepResult, train_step
from trainer.stop import Stop
from trainer.tracking import Tracker
from trainer.validate import HeldOut
from trainer.writer import Writer


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlets:
    """Where a loop's results go. facts: the provenance that every checkpoint carries."""

    folder: RunFolder
    writer: Writer
    tracker: Tracker
    progress: Progress
    facts: Mapping[str, Any]


def run_steps(built: Built, outlets: Outlets, held_out: HeldOut, first_step: int, stop: Stop, stop_at: int) -> int:
    """Train from step `first_step` to `stop_at` or the end, or until `stop()`; saves at the end; returns the step.

    A step that was interrupted leaves nothing behind, so the checkpoint is of the last whole one.
    """
    begun, done, saved = time.perf_counter(), first_step, first_step
    last = min(stop_at, len(built.plans))
    while done < last and not stop():
        started = time.perf_counter()
        plan = built.plans[done]
        result = train_step(built.parts, plan, stop)
        if result is None:
            break
        done += 1
        seconds = time.perf_counter() - started
        row = _row(plan, result, seconds, time.perf_counter() - begun)
        if done % built.config.validation.every_steps == 0 or done == len(built.plans):
            row |= held_out.measure(built.parts.pool, plan.attention)
        _emit(outlets, row)
        if done % built.config.checkpoint.every_steps == 0:
            save(built, outlets, done)
            saved = done
    if done > saved:
        save(built, outlets, done)
    return done


def save(built: Built, outlets: Outlets, done: int) -> None:
    """Hand the state after `done` steps to the writer; its tensors and a JSON state are all that a resume needs."""
    outlets.folder.sync_metrics()
    outlets.writer.submit(done, built.tensors(), {"step": done, "facts": dict(outlets.facts)})


def _row(plan: StepPlan, result: StepResult, seconds: float, run_s: float) -> dict[str, Any]:
    tokens = plan.rows * plan.row_length
    row = {
        "step": plan.step + 1,
        "tokens": plan.tokens + tokens,
        "time/run_s": run_s,
        "time/step_s": seconds,
        "speed/tokens_per_s": tokens / seconds,
        "schedule/rate": plan.rate,
        "schedule/rows": plan.rows,
        "schedule/row_length": plan.row_length,
        "schedule/mtp_weight": plan.mtp_weight,
        "schedule/attention": plan.attention,
        "optim/grad_norm": result.update.norm,
        "optim/clip_scale": result.update.clip_scale,
    }
    row |= metrics.losses(result.rows, result.counts)
    row |= metrics.routing(result.rows, result.counts)
    return row | {f"optim/update_rms/{group}": rms for group, rms in sorted(result.update.update_rms.items())}


def _emit(outlets: Outlets, row: dict[str, Any]) -> None:
    assert all(metrics.is_known(name) for name in row), set(row) - set(metrics.METRICS)
    outlets.folder.append_metrics(row)
    outlets.tracker.log(row["step"], row)
    outlets.progress.step(row)
