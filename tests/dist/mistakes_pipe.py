"""Mistakes of stages, each of which is planted once and must be seen (tests/dist/test_mistakes.py)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.transformer import Transformer
from trainer import row, step
from trainer.parallel.owners import Ownership
from trainer.parallel.reduce import ExactSum
from trainer.passes import Learning, Stage
from trainer.step import RowsHere

Patch = pytest.MonkeyPatch


def embedding_not_added_between_the_ends(patch: Patch) -> None:
    patch.setattr(ExactSum, "join", lambda self, name, group: None)


def embedding_counted_on_both_ends(patch: Patch) -> None:
    patch.setattr(Ownership, "is_told_elsewhere", lambda self, parameter: False)


def streams_rounded_on_their_way(patch: Patch) -> None:
    leave = Stage.leave

    def leave_in_bf16(self: Stage, x_BTND: Tensor | None, loss: Tensor) -> Tensor:
        gone = leave(self, x_BTND, loss)
        return gone if x_BTND is None else gone.bfloat16().to(gone.dtype)

    patch.setattr(Stage, "leave", leave_in_bf16)


def last_stage_draws_the_row_before(patch: Patch) -> None:
    """Its ids, and so its targets, are not those of the streams that come."""
    pick = RowsHere.pick

    def pick_late(self: RowsHere, turn: int) -> Any:
        return pick(self, max(turn - 1, 0) if dist.get_rank() == dist.get_world_size() - 1 else turn)

    patch.setattr(RowsHere, "pick", pick_late)


def loads_of_the_first_layers_on_every_stage(patch: Patch) -> None:
    """A stage's router biases follow the loads of as many first layers."""
    patch.setattr(Transformer, "block_numbers", property(lambda self: tuple(range(len(self.blocks())))))


def no_balance_loss_before_the_last_stage(patch: Patch) -> None:
    """Its terms are attached to the streams inside layers, which end in no loss there."""
    forward = row.forward

    def forward_without(model: Transformer, one: Any, mode: Any, weights: row.Weights, *rest: Any) -> row.Passed:
        layers = weights.layers if model.is_last else replace(weights.layers, balance=0.0)
        return forward(model, one, mode, replace(weights, layers=layers), *rest)

    patch.setattr(row, "forward", forward_without)


def gradients_of_a_row_left_for_the_next(patch: Patch) -> None:
    """Of two rows under way the second finds what the first has left: one leaf where two belong."""
    collect, calls = step._collect, []

    def collect_every_other(*given: Any) -> Any:
        calls.append(1)
        return collect(*given) if len(calls) % 2 == 0 or dist.get_rank() else None

    patch.setattr(step, "_collect", collect_every_other)


def gradient_of_the_streams_halved(patch: Patch) -> None:
    backward = Learning.backward

    def backward_halved(self: Learning, turn: int, layers: range, grad_BTND: Tensor | None) -> None:
        backward(self, turn, layers, None if grad_BTND is None else torch.mul(grad_BTND, 0.5))

    patch.setattr(Learning, "backward", backward_halved)
