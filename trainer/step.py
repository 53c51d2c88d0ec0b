"""One optimizer step on one screen: rows, leaves, exact sums, clip and update, router biases.

A row is a leaf: it runs alone, and its gradients enter an order-free sum. So the step's bits depend neither on how
rows are grouped nor on who computes them (promise 3 of the design).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.batch import Batch
from data.stream import Stream
from model.config import AttentionMode
from model.names import alias_of
from model.router import update_bias
from model.transformer import Transformer
from optim.optimizer import Optimizer, UpdateStats
from trainer import row, together
from trainer.config import LossConfig
from trainer.debug.fault import Fault, NonFinite, require_finite
from trainer.laps import Laps, PassLaps, StepSeconds, seconds_of
from trainer.parallel.expert import leaves, stand_by
from trainer.parallel.fast import FastSum
from trainer.parallel.mesh import rows_of
from trainer.parallel.owners import ExactReduction, Handout, Ownership
from trainer.parallel.world import World
from trainer.passes import Learning
from trainer.pool import RowPool
from trainer.precision.serving import Precision
from trainer.row import RowSums, TermCounts, Weights
from trainer.schedule import StepPlan, after

if TYPE_CHECKING:
    from trainer.parallel.pipeline import Pipeline

Verify = Callable[[], None]


def skip() -> None:
    """The `Verify` that does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a step works on. pool: the model, as often as rows run at the same time. groups: by parameter name.

    world: the ranks that take the step together. ownership: whose the optimizer's tensors are. handout: of weights.
    pipeline: what runs the rows where the layers are shared out. precision: the formats of weights and products.
    """

    pool: RowPool
    optimizer: Optimizer
    sums: ExactReduction | FastSum
    handout: Handout
    stream: Stream
    loss: LossConfig
    groups: dict[str, str]
    device: torch.device
    world: World
    ownership: Ownership
    precision: Precision
    pipeline: "Pipeline | None" = None

    @property
    def model(self) -> Transformer:
        return self.pool.model


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step leaves for the metrics. batch: the rows of this rank; the others are of all ranks."""

    batch: Batch
    counts: TermCounts
    rows: tuple[RowSums, ...]
    load_LE: Tensor
    update: UpdateStats
    seconds: StepSeconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Complaint:
    """Row `index` of the step is at fault."""

    index: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsHere:
    """This rank's rows of a step. mine: their numbers by turn, None where it has none; turns: those that it takes."""

    batch: Batch
    mine: Sequence[int | None]
    turns: Sequence[int]
    device: torch.device

    def pick(self, turn: int) -> Batch | None:
        """The row of a turn as a batch of one, on the device."""
        return None if self.mine[turn] is None else row.pick(self.batch, turn, self.device)


Outcome = RowSums | Complaint | None
"""What became of a row; None: nothing was computed."""


def train_step(parts: Parts, plan: StepPlan, stopped: Callable[[], bool], verify: Verify = skip) -> StepResult | None:
    """Run one step; None, with nothing changed, if `stopped()` turned true between two rows (on one process).

    verify: called when all rows are computed; it may raise. Raises NonFinite, with nothing changed, for the first row
    whose losses or gradients are not finite; OverflowError, likewise, where the sum of the rows' gradients could
    overflow. On many ranks all of them raise it.
    """
    frozen = frozen_groups(plan.attention, parts.groups)
    whole_step = Laps(parts.device)
    mine = rows_of(parts.world.place.data, parts.world.mesh.data, plan.rows)
    batch = together.read_rows(parts.stream, plan, mine)
    counts = together.count(parts.world, row.count_rows(batch))
    whole_step.mark()
    weights = _weigh(counts, plan, parts.loss)
    for view in parts.pool.views:
        train_only(view, parts.groups, frozen)
    active = {name for name, group in parts.groups.items() if group not in frozen}
    parts.sums.begin(plan.step, active)
    # All rows end before the first fault is told of, so that it does not depend on which thread was faster.
    turns = [turn for turn, index in enumerate(mine) if index is not None or parts.world.expert.size > 1]
    rows_here = RowsHere(batch=batch, mine=mine, turns=turns, device=parts.device)
    if parts.pipeline is None:
        results, row_laps = _run_alone(parts, plan, weights, rows_here, stopped)
    else:
        results, row_laps = _run_stage(parts, parts.pipeline, plan, weights, rows_here)
    whole_step.mark()
    parts.world.beat.mark("reduction", row=None)
    verify()  # first: a flipped bit may be why a row is at fault
    _refuse_complaints(parts, plan, weights, [result for result in results if isinstance(result, Complaint)])
    by_turn = [(mine[turn], result) for turn, result in zip(turns, results, strict=True)]
    done = {index: result for index, result in by_turn if index is not None and isinstance(result, RowSums)}
    if len(done) < len(batch.token_BT):
        return None
    rows, load_LE = together.gather_rows(parts.world, done)
    whole_step.mark()
    gradients = parts.sums.finish()
    whole_step.mark()
    parts.world.beat.mark("update")
    update = parts.optimizer.step(gradients, rate=plan.rate, frozen_groups=frozen)
    whole_step.mark()
    changed = parts.precision.enter(after(plan))
    parts.optimizer.write(changed)
    parts.handout.begin(_weights(parts), active | changed)
    if plan.attention != "indexer_warmup":
        update_biases(parts.model, load_LE, parts.loss.bias_update_speed)
    whole_step.mark()
    seconds = seconds_of(whole_step, row_laps, parts.pool.width, staged=parts.pipeline is not None)
    return StepResult(batch=batch, counts=counts, rows=rows, load_LE=load_LE, update=update, seconds=seconds)


def _run_alone(
    parts: Parts, plan: StepPlan, weights: Weights, here: RowsHere, stopped: Callable[[], bool]
) -> tuple[list[Outcome], list[Laps | PassLaps]]:
    """The rows through the whole model, side by side where there are threads."""
    row_laps: list[Laps | PassLaps] = []

    def leaf(model: Transformer, turn: int) -> Outcome:
        if stopped():
            return None
        parts.sums.begin_row(last=turn == here.turns[-1])
        laps, index, one = Laps(parts.device), here.mine[turn], here.pick(turn)
        parts.world.beat.row("passes", index)
        if index is None or one is None:
            _stand_by(model, plan.attention)
            return _collect(parts, model, turn)
        try:
            result = learn(model, one, plan.attention, weights, laps)
            require_finite(result)
        except FloatingPointError as error:
            # What the round has left of others' rows is looked at all the same: an earlier one may be at fault, too.
            return _first([Complaint(index=index, reason=str(error)), _collect(parts, model, turn)])
        complaint = _collect(parts, model, turn)
        laps.mark()
        row_laps.append(laps)
        return complaint or result

    return list(parts.pool.map(leaf, here.turns)), row_laps


def _run_stage(
    parts: Parts, pipeline: "Pipeline", plan: StepPlan, weights: Weights, here: RowsHere
) -> tuple[list[Outcome], list[Laps | PassLaps]]:
    """The rows through this rank's stage, in the order of its schedule: what its layers found, or complain of."""
    complaints: dict[int, list[Complaint | None]] = {turn: [] for turn in here.turns}

    def begin(turn: int) -> None:
        parts.world.beat.row("backward", here.mine[turn])
        # Of two chunks one is done before the other: then nothing leaves before both are.
        parts.sums.begin_row(last=turn == here.turns[-1] and len(pipeline.chunks) == pipeline.column.size)

    def finish(turn: int, found: RowSums | None) -> None:
        index = here.mine[turn]
        if found is not None and index is not None:
            try:
                require_finite(found)
            except FloatingPointError as error:
                complaints[turn].append(Complaint(index=index, reason=str(error)))
        complaints[turn].append(_collect(parts, parts.model, turn))

    def pick(turn: int) -> Batch | None:
        parts.world.beat.row("forward", here.mine[turn])
        return here.pick(turn)

    stage = pipeline.stage(plan.row_length)
    passes = Learning(stage, pick, plan.attention, weights, begin=begin, finish=finish)
    pipeline.learn(passes, here.turns, plan.row_length)
    return [_first(complaints[turn]) or passes.sums(turn) for turn in here.turns], [*passes.laps]


def _stand_by(model: Transformer, mode: AttentionMode) -> None:
    """A round in which others have rows and this rank has none, forwards and, if they have one, backwards."""
    end = stand_by(model, backward=mode != "indexer_warmup")
    if end.requires_grad:
        end.backward()


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


def update_biases(model: Transformer, load_LE: Tensor, speed: float) -> None:
    """The auxiliary-loss-free rule, from the loads of the whole step, all ranks' rows (V3 2.1.2)."""
    for block, load_E in zip(model.blocks(), load_LE[list(model.block_numbers)], strict=True):
        gate = block.ffn.gate
        if not gate.hashed:
            update_bias(gate.bias, load_E.to(gate.bias.device), speed)


def train_only(model: Transformer, groups: Mapping[str, str], frozen: Collection[str]) -> None:
    """Parameters of the frozen groups get no gradients; none has one yet. groups: by parameter name."""
    for name, leaf, _ in leaves(model):
        leaf.requires_grad_(groups[alias_of(name) or name] not in frozen)
        leaf.grad = None


def _weigh(counts: TermCounts, plan: StepPlan, loss: LossConfig) -> Weights:
    return row.weigh(counts, mtp=plan.mtp_weight, balance=loss.balance_weight, indexer=loss.indexer_weight)


def _collect(parts: Parts, model: Transformer, turn: int) -> Complaint | None:
    """Move the gradients of a round into the sums; each use of a shared weight is a leaf of its own.

    The leaves of experts are of the rows of the whole expert group. Returns the complaint of the first of these rows.
    """
    place, mesh = parts.world.place, parts.world.mesh
    complaint = None
    for name, leaf, of_row in leaves(model):
        data = place.data if of_row is None else place.data - place.expert + of_row
        index = turn * mesh.data + data
        if leaf.grad is not None and (complaint is None or index < complaint.index):
            try:
                parts.sums.add(alias_of(name) or name, leaf.grad)
            except FloatingPointError as error:
                complaint = Complaint(index=index, reason=str(error))
        leaf.grad = None
    return complaint


def _first(complaints: Sequence[Complaint | None]) -> Complaint | None:
    """The complaint of the first row; of one row's, the first."""
    return min((one for one in complaints if one), key=lambda one: one.index, default=None)


def _refuse_complaints(parts: Parts, plan: StepPlan, weights: Weights, mine: Sequence[Complaint]) -> None:
    """Raise NonFinite for the first row that any rank complains of, on all ranks."""
    own = _first(mine)
    first = parts.world.least(plan.rows if own is None else own.index)
    if first == plan.rows:
        return
    reasons = parts.world.gather(own.reason if own is not None and own.index == first else None)
    # The ranks that have the row know most: others have a part of its gradients. Of stages, that with the losses.
    column = parts.world.mesh.column_group(first % parts.world.mesh.data)
    told = list(filter(None, (reasons[rank] for rank in column))) or list(filter(None, reasons))
    reason = min(told, key=lambda reason: not reason.startswith(("loss/lm", "loss/mtp")))
    one = parts.stream.rows(plan.segment, plan.first_row + first, 1)
    raise NonFinite(Fault(index=first, row=row.pick(one, 0, parts.device), plan=plan, weights=weights, reason=reason))


def _weights(parts: Parts) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parts.model.named_parameters() if name in parts.groups}
