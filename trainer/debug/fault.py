"""A row whose losses or gradients are no numbers any more: found as it is computed, kept to be computed again."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from data.batch import Batch
from trainer.row import RowSums, Weights
from trainer.schedule import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Row `index` of a step (a batch of one), and all that computing it again takes besides the model."""

    index: int
    row: Batch
    plan: StepPlan
    weights: Weights
    reason: str


class NonFinite(FloatingPointError):
    """A step that was not applied, because a row of it is at fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"step {fault.plan.step + 1}, row {fault.index + 1} of {fault.plan.rows}: {fault.reason}")
        self.fault = fault


def require_finite(sums: RowSums) -> None:
    """Raises FloatingPointError naming the first loss of a row that is not finite."""
    for name, loss in _losses(sums):
        if not math.isfinite(loss):
            raise FloatingPointError(f"{name}: expected finite values, found {loss}")


def _losses(sums: RowSums) -> Iterator[tuple[str, float]]:
    yield from (("loss/lm", sums.lm), ("loss/mtp", sums.mtp))
    for name, by_layer in (("loss/balance", sums.balance_L), ("loss/indexer", sums.indexer_L)):
        yield from ((f"{name} of layer {layer}", loss) for layer, loss in enumerate(by_layer) if loss is not None)
