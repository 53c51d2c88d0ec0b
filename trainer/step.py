"""One optimizer step on one screen: rows, leaves, exact sums, clip and update, router biases.

A row is a leaf: it runs alone, and its gradients enter an order-free sum. So the step's bits depend neither on how
rows are grouped nor on who computes them (promise 3 of the design).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.stream import Stream
from model.config import AttentionMode
from model.names import alias_of
from model.router import update_bias
from model.transformer import Transformer
from optim.optimizer import Optimizer, UpdateStats
from trainer import row
from trainer.config import LossConfig
from trainer.parallel.reduce import ExactSum
from trainer.row import RowSums, TermCounts
from trainer.schedule import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a step works on. groups: the parameter groups of the model by parameter name."""

    model: Transformer
    optimizer: Optimizer
    sums: ExactSum
    stream: Stream
    loss: LossConfig
    groups: dict[str, str]
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step leaves for the metrics."""

    counts: TermCounts
    rows: tuple[RowSums, ...]
    update: UpdateStats


def train_step(parts: Parts, plan: StepPlan, stopped: Callable[[], bool]) -> StepResult | None:
    """Run one step; None, with nothing changed, if `stopped()` turned true between two rows."""
    frozen = frozen_groups(plan.attention, parts.groups)
    batch = parts.stream.rows(plan.segment, plan.first_row, plan.rows)
    counts = row.count_rows(batch)
    weights = row.weigh(
        counts, mtp=plan.mtp_weight, balance=parts.loss.balance_weight, indexer=parts.loss.indexer_weight
    )
    _train_only(parts, frozen)
    parts.sums.reset()
    results = []
    for index in range(plan.rows):
        if stopped():
            return None
        leaf = row.pick(batch, index, parts.device)
        if plan.attention == "indexer_warmup":
            results.append(row.learn_indexer(parts.model, leaf, weights))
        else:
            results.append(row.learn(parts.model, leaf, plan.attention, weights))
        _collect(parts)
    gradients = _trained(parts, parts.sums.result(), frozen)
    update = parts.optimizer.step(gradients, rate=plan.rate, frozen_groups=frozen)
    if plan.attention != "indexer_warmup":
        update_biases(parts.model, results, parts.loss.bias_update_speed)
    return StepResult(counts=counts, rows=tuple(results), update=update)


def frozen_groups(mode: AttentionMode, groups: dict[str, str]) -> frozenset[str]:
    """Groups that a stage leaves alone: the indexer while attention is dense, all others while the indexer warms up."""
    if mode == "dense":
        return frozenset({"indexer"})
    return frozenset(groups.values()) - {"indexer"} if mode == "indexer_warmup" else frozenset()


def update_biases(model: Transformer, rows: list[RowSums], speed: float) -> None:
    """The auxiliary-loss-free rule, from the loads of the whole step (V3 2.1.2)."""
    load_LE = torch.stack([result.load_LE for result in rows]).sum(0)
    for block, load_E in zip([*model.layers, *model.mtp], load_LE, strict=True):
        if not block.ffn.gate.hashed:
            update_bias(block.ffn.gate.bias, load_E.to(block.ffn.gate.bias.device), speed)


def _train_only(parts: Parts, frozen: frozenset[str]) -> None:
    for name, parameter in parts.model.named_parameters():
        parameter.requires_grad_(parts.groups[alias_of(name) or name] not in frozen)
        parameter.grad = None


def _collect(parts: Parts) -> None:
    """Move the row's gradients into the sums; each use of a shared weight is a leaf of its own."""
    for name, parameter in parts.model.named_parameters():
        if parameter.grad is not None:
            parts.sums.add(alias_of(name) or name, parameter.grad)
            parameter.grad = None


def _trained(parts: Parts, gradients: dict[str, Tensor], frozen: frozenset[str]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if parts.groups[name] not in frozen}
