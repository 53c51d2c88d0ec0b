"""One row of metrics.jsonl: what a step did, how long its parts took, and the health of the model after it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from model.count import training_flops
from model.layers import island_dtype
from model.transformer import Transformer
from trainer import machine, metrics, probe, together
from trainer.build import Built
from trainer.parallel.world import ALONE, World
from trainer.precision import health
from trainer.probe import Pass
from trainer.schedule import StepPlan
from trainer.step import Parts, StepResult
from trainer.validate import HeldOut, count_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Observer:
    """Measures and changes nothing. product_rate: `machine.product_rate` of this session, all ranks together.

    On many ranks all of them measure alike; what one rank alone can tell, time and memory, is rank 0's.
    """

    built: Built
    held_out: HeldOut
    product_rate: float
    _flops: dict[tuple[int, str], int] = field(default_factory=dict)

    def watching(self, plan: StepPlan) -> AbstractContextManager[list[Pass]]:
        """Around the step: its forward passes, where it is one that is looked at closely, else none.

        A function of the step alone, so that an interrupted run tells the same as an uninterrupted one.
        """
        return self._watched() if self._is_watched(plan) else nullcontext([])

    @contextmanager
    def _watched(self) -> Iterator[list[Pass]]:
        parts = self.built.parts
        with probe.watched(parts.pool.views) as passes, parts.precision.watched():
            yield passes

    def _is_watched(self, plan: StepPlan) -> bool:
        done, every = plan.step + 1, self.built.config.observe.every_steps
        return every > 0 and (done % every == 0 or done in (1, len(self.built.plans)))

    def row(self, plan: StepPlan, result: StepResult, passes: Sequence[Pass], step_s: float) -> dict[str, Any]:
        """The numbers of a step that took `step_s`; the model must be as the step left it."""
        parts, counts = self.built.parts, result.counts
        row = _plan(plan, step_s) | self._speed(plan, step_s) | machine.memory(parts.device)
        row |= {f"time/{part}_s": getattr(result.seconds, part) for part in result.seconds.__slots__}
        row |= metrics.losses(result.rows, counts)
        row |= metrics.by_source(result.rows, parts.stream.source_names)
        num_bytes = together.add(parts.world, count_bytes(result.batch.target_BT, self.held_out.byte_count_V))
        row["loss/bits_per_byte"] = metrics.bits_per_byte(result.rows, num_bytes)
        row |= {"optim/grad_norm": result.update.norm, "optim/clip_scale": result.update.clip_scale}
        row |= {f"optim/update_rms/{group}": rms for group, rms in sorted(result.update.update_rms.items())}
        row |= metrics.routing(result.rows, counts, result.load_LE)
        row |= biases(parts.model, parts.world)
        row["speed/rank_load_max_ratio"] = metrics.rank_load(result.load_LE, parts.world.expert.size)
        if self._is_watched(plan):
            row |= {"router/load_LE": result.load_LE.tolist()} | probe.measure(passes, parts.world, parts.pipeline)
            row |= weight_rms(parts) | precision(parts)
        return row

    def _speed(self, plan: StepPlan, step_s: float) -> dict[str, float]:
        shape = (plan.row_length, plan.attention)
        if shape not in self._flops:
            self._flops[shape] = training_flops(self.built.config.model, plan.row_length, plan.attention).total
        rate = plan.rows * self._flops[shape] / step_s
        return {
            "speed/tokens_per_s": plan.rows * plan.row_length / step_s,
            "speed/model_flops_per_s": rate,
            "speed/utilisation": rate / self.product_rate,
        }


def _plan(plan: StepPlan, step_s: float) -> dict[str, Any]:
    return {
        "step": plan.step + 1,
        "tokens": plan.tokens + plan.rows * plan.row_length,
        "time/step_s": step_s,
        "schedule/rate": plan.rate,
        "schedule/rows": plan.rows,
        "schedule/row_length": plan.row_length,
        "schedule/mtp_weight": plan.mtp_weight,
        "schedule/attention": plan.attention,
    }


def biases(model: Transformer, world: World = ALONE) -> dict[str, float]:
    """The range of the router biases; nothing where all layers are hash-routed."""
    learned = [block.ffn.gate.bias for block in model.blocks() if not block.ffn.gate.hashed]
    own = [float(bound) for bias_E in learned for bound in (bias_E.min(), bias_E.max())]
    bounds = [bound for of_rank in world.gather(own) for bound in of_rank]
    return {"router/bias_min": min(bounds), "router/bias_max": max(bounds)} if bounds else {}


def precision(parts: Parts) -> dict[str, float]:
    """The health of what the step has rounded, and of the weights after it; nothing where no format is in use.

    Sums of squares are added by row and layer: their last digits may depend on how experts are shared out.
    """
    weights = parts.precision.weights
    every = parts.precision.seen() | health.of_weights(parts.optimizer, weights)
    mine = {kind: health.together(of) for kind, of in every.items() if of}
    kinds: dict[str, list[health.Seen]] = {}
    tiles: dict[str, int] = {}
    for found, inexact in parts.world.gather((mine, health.inexact(parts.optimizer, weights))):
        for kind, of_rank in found.items():
            kinds.setdefault(kind, []).append(of_rank)
        for group, number in inexact.items():
            tiles[f"fp4/inexact_tiles/{group}"] = tiles.get(f"fp4/inexact_tiles/{group}", 0) + number
    return health.measure(kinds) | tiles


@torch.no_grad()
def weight_rms(parts: Parts) -> dict[str, float]:
    """RMS of the parameters by group, as the model computes with them; the same however they are shared out.

    A logical tensor's norm is computed by itself, where it is owned; their squares are added exactly.
    """
    told = list(parts.optimizer.weights())
    norms = [torch.linalg.vector_norm(weight, dtype=island_dtype(weight.dtype)) for _, weight in told]
    numbers: dict[str, list[float]] = {}
    for (group, weight), norm in zip(told, torch.stack(norms).double().tolist() if norms else [], strict=True):
        numbers.setdefault(f"size/{group}", []).append(weight.numel())
        numbers.setdefault(f"square/{group}", []).append(norm**2)
    totals = parts.world.totals(numbers)
    sizes = {key.removeprefix("size/"): size for key, size in totals.items() if key.startswith("size/")}
    return {f"optim/weight_rms/{group}": math.sqrt(totals[f"square/{group}"] / sizes[group]) for group in sorted(sizes)}
