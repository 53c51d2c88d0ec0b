"""One optimizer step on one screen: rows, leaves, exact sums, clip and update, router biases.

A row is a leaf: it runs alone, and its gradients enter an order-free sum. So the step's bits depend neither on how
rows are grouped nor on who computes them (promise 3 of the design).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import Batch
from data.stream import Stream
from model.config import AttentionMode
from model.names import alias_of
from model.router import update_bias
from model.transformer import Transformer
from optim.optimizer import Optimizer, UpdateStats
from trainer import row
from trainer.config import LossConfig
from trainer.debug.fault import Fault, NonFinite, require_finite
from trainer.laps import Laps
from trainer.parallel.reduce import ExactSum
from trainer.pool import RowPool
from trainer.row import RowSums, TermCounts, Weights
from trainer.schedule import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a step works on. pool: the model, as often as rows run at the same time. groups: by parameter name."""

    pool: RowPool
    optimizer: Optimizer
    sums: ExactSum
    stream: Stream
    loss: LossConfig
    groups: dict[str, str]
    device: torch.device

    @property
    def model(self) -> Transformer:
        return self.pool.model


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSeconds:
    """Where a step's time went. forward, backward, reduce: summed over rows, divided by the rows side by side."""

    wait: float
    forward: float
    backward: float
    reduce: float
    update: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step leaves for the metrics."""

    batch: Batch
    counts: TermCounts
    rows: tuple[RowSums, ...]
    update: UpdateStats
    seconds: StepSeconds


def train_step(parts: Parts, plan: StepPlan, stopped: Callable[[], bool]) -> StepResult | None:
    """Run one step; None, with nothing changed, if `stopped()` turned true between two rows.

    Raises NonFinite, with nothing changed, for the first row whose losses or gradients are not finite; OverflowError,
    likewise, where the sum of the rows' gradients could overflow.
    """
    frozen = frozen_groups(plan.attention, parts.groups)
    whole_step = Laps(parts.device)
    batch = parts.stream.rows(plan.segment, plan.first_row, plan.rows)
    whole_step.mark()
    counts = row.count_rows(batch)
    weights = row.weigh(
        counts, mtp=plan.mtp_weight, balance=parts.loss.balance_weight, indexer=parts.loss.indexer_weight
    )
    for view in parts.pool.views:
        train_only(view, parts.groups, frozen)
    parts.sums.reset()

    row_laps: list[Laps] = []

    def leaf(model: Transformer, index: int) -> RowSums | Fault | None:
        if stopped():
            return None
        laps = Laps(parts.device)
        one = row.pick(batch, index, parts.device)
        try:
            result = learn(model, one, plan.attention, weights, laps)
            require_finite(result)
            _collect(model, parts.sums)
        except FloatingPointError as error:
            model.zero_grad(set_to_none=True)
            return Fault(index=index, row=one, plan=plan, weights=weights, reason=str(error))
        laps.mark()
        row_laps.append(laps)
        return result

    # All rows end before the first fault is told of, so that it does not depend on which thread was faster.
    results = list(parts.pool.map(leaf, range(plan.rows)))
    for result in results:
        if isinstance(result, Fault):
            raise NonFinite(result)
    whole = [result for result in results if isinstance(result, RowSums)]
    if len(whole) < plan.rows:
        return None
    whole_step.mark()
    gradients = _trained(parts, parts.sums.result(), frozen)
    update = parts.optimizer.step(gradients, rate=plan.rate, frozen_groups=frozen)
    if plan.attention != "indexer_warmup":
        update_biases(parts.model, whole, parts.loss.bias_update_speed)
    whole_step.mark()
    seconds = _seconds(whole_step, row_laps, parts.pool.width)
    return StepResult(batch=batch, counts=counts, rows=tuple(whole), update=update, seconds=seconds)


def learn(model: Transformer, one: Batch, mode: AttentionMode, weights: Weights, laps: Laps | None = None) -> RowSums:
    """Forward and backward of one row (a batch of one) as its attention mode asks; gradients are left in `grad`."""
    if mode == "indexer_warmup":
        return row.learn_indexer(model, one, weights, laps)
    return row.learn(model, one, mode, weights, laps)


def frozen_groups(mode: AttentionMode, groups: dict[str, str]) -> frozenset[str]:
    """Groups that a stage leaves alone: the indexer while attention is dense, all others while the indexer warms up."""
    if mode == "dense":
        return frozenset({"indexer"})
    return frozenset(groups.values()) - {"indexer"} if mode == "indexer_warmup" else frozenset()


def update_biases(model: Transformer, rows: list[RowSums], speed: float) -> None:
    """The auxiliary-loss-free rule, from the loads of the whole step (V3 2.1.2)."""
    load_LE = torch.stack([result.load_LE for result in rows]).sum(0)
    for block, load_E in zip(model.blocks(), load_LE, strict=True):
        gate = block.ffn.gate
        if not gate.hashed:
            update_bias(gate.bias, load_E.to(gate.bias.device), speed)


def _seconds(whole_step: Laps, rows: list[Laps], threads: int) -> StepSeconds:
    """Laps of the step: wait, rows, update; of a row: forward, backward, reduce."""
    wait, _, update = whole_step.seconds()
    side_by_side = min(threads, len(rows))
    by_part = zip(*(laps.seconds() for laps in rows), strict=True)
    forward, backward, reduce = (math.fsum(part) / side_by_side for part in by_part)
    return StepSeconds(wait=wait, forward=forward, backward=backward, reduce=reduce, update=update)


def train_only(model: Transformer, groups: Mapping[str, str], frozen: frozenset[str]) -> None:
    """Parameters of the frozen groups get no gradients; none has one yet. groups: by parameter name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(groups[alias_of(name) or name] not in frozen)
        parameter.grad = None


def _collect(model: Transformer, sums: ExactSum) -> None:
    """Move the row's gradients into the sums; each use of a shared weight is a leaf of its own."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            sums.add(alias_of(name) or name, parameter.grad)
            parameter.grad = None


def _trained(parts: Parts, gradients: dict[str, Tensor], frozen: frozenset[str]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if parts.groups[name] not in frozen}
