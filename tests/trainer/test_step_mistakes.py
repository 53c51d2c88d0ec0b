"""Negative controls: deliberate mistakes in a step, each of which a check of `test_step.py` must see."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.batch import Batch
from model.names import alias_of
from optim.optimizer import Optimizer
from tests.trainer import step_checks, steps
from trainer import row, step, together
from trainer.laps import Laps
from trainer.parallel.reduce import ExactSum
from trainer.parallel.world import World
from trainer.step import Parts, StepResult

Patch = pytest.MonkeyPatch


def float_sums(patch: Patch) -> None:
    """Rows are added as they come, in floating point."""

    def add(self: ExactSum, name: str, leaf_P: Tensor, largest: float) -> None:
        total = self._sums[name].view(-1)
        summed = total.view(torch.float64).float() + leaf_P
        total.copy_(summed.double().view(torch.int64))
        self._largest[name] += largest

    patch.setattr(ExactSum, "_add", add)
    patch.setattr(ExactSum, "read", lambda self, name, rows: self._sums[name][rows].view(torch.float64).float())


def shared_uses_added_first(patch: Patch) -> None:
    """The MTP branch's gradient of a shared weight is added to the main model's in floating point."""

    def collect(parts: Parts, model: torch.nn.Module, turn: int) -> None:
        leaves: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                shared = alias_of(name) or name
                leaves[shared] = leaves[shared] + parameter.grad if shared in leaves else parameter.grad
                parameter.grad = None
        for name, leaf in leaves.items():
            parts.sums.add(name, leaf)

    patch.setattr(step, "_collect", collect)


def counts_per_row(patch: Patch) -> None:
    """Each row is divided by its own counts, and the rows are averaged."""
    learn = row.learn

    def learn_alone(
        model: torch.nn.Module, one: Batch, mode: str, weights: row.Weights, laps: Laps | None
    ) -> row.RowSums:
        own = row.weigh(row.count_rows(one), mtp=0.3 / 4, balance=1e-4 / 4, indexer=1.0 / 4)
        return learn(model, one, mode, replace(own, lm=own.lm / 4), laps)

    patch.setattr(row, "learn", learn_alone)


def load_of_the_last_row(patch: Patch) -> None:
    gather = together.gather_rows

    def gather_last(world: World, mine: dict[int, row.RowSums]) -> tuple[tuple[row.RowSums, ...], Tensor]:
        return gather(world, mine)[0], mine[max(mine)].load_LE

    patch.setattr(together, "gather_rows", gather_last)


def biases_in_warm_up(patch: Patch) -> None:
    take = step.train_step

    def and_biases(parts: Parts, *rest: object) -> StepResult | None:
        result = take(parts, *rest)
        step.update_biases(parts.model, result.load_LE, 1e-3)
        return result

    patch.setattr(steps, "train_step", and_biases)


def frozen_groups_decay(patch: Patch) -> None:
    update = Optimizer.step

    def decay_too(
        self: Optimizer, gradients: dict[str, Tensor], *, rate: float, frozen_groups: frozenset[str]
    ) -> object:
        for name, parameter in self._parameters.items():
            if self._group[name] in frozen_groups:
                parameter.mul_(1 - rate * 0.1)
        return update(self, gradients, rate=rate, frozen_groups=frozen_groups)

    patch.setattr(Optimizer, "step", decay_too)


def frozen_groups_take_part(patch: Patch) -> None:
    """Nothing is frozen: gradients of zero still move momentum, decay and the counts of updates."""
    patch.setattr(step, "frozen_groups", lambda mode, groups: frozenset())


@pytest.mark.parametrize(
    ("mistake", "check"),
    [
        (float_sums, step_checks.check_order_of_rows),
        (shared_uses_added_first, step_checks.check_leaves),
        (counts_per_row, step_checks.check_denominators),
        (load_of_the_last_row, step_checks.check_bias_rule),
        (biases_in_warm_up, step_checks.check_indexer_warmup),
        (frozen_groups_decay, step_checks.check_indexer_warmup),
        (frozen_groups_take_part, step_checks.check_indexer_warmup),
    ],
)
def test_a_mistake_is_seen(mistake: Callable[[Patch], None], check: Callable[[], None], monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check()
