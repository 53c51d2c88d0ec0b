"""Deliberate mistakes of many ranks in rows, experts and sums: planted in all processes, most of them act on one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.stream import Stream
from model.dispatch import at_least_fp32
from model.losses import TermCounts
from model.transformer import Transformer
from optim.groups import Span
from trainer import build, row, step, together
from trainer.parallel import expert
from trainer.parallel.expert import Arrived, ExpertDispatcher
from trainer.parallel.mesh import rows_of
from trainer.parallel.owners import ExactReduction, Ownership
from trainer.parallel.reduce import ExactSum
from trainer.parallel.world import World
from trainer.row import RowSums
from trainer.schedule import StepPlan

Patch = pytest.MonkeyPatch
TWO_RANKS = 2


# rows


def neighbours_row(patch: Patch) -> None:
    """A shifted cursor: rank 1 reads the rows of the rank after it."""
    _read(patch, lambda mine, rows: [(one + 1) % rows for one in mine] if dist.get_rank() == 1 else mine)


def everybody_reads_the_same_rows(patch: Patch) -> None:
    _read(patch, lambda mine, rows: [one - dist.get_rank() for one in mine])


def _read(patch: Patch, choose: Callable[[list[int], int], list[int]]) -> None:
    read = together.read_rows

    def read_others(stream: Stream, plan: StepPlan, mine: Sequence[int | None]) -> Batch:
        return read(stream, plan, choose([one for one in mine if one is not None], plan.rows))

    patch.setattr(together, "read_rows", read_others)


def a_rank_without_a_row_takes_the_last(patch: Patch) -> None:
    def all_busy(data: int, ranks: int, rows: int) -> tuple[int, ...]:
        return tuple(rows - 1 if index is None else index for index in rows_of(data, ranks, rows))

    patch.setattr(step, "rows_of", all_busy)


def denominators_of_own_rows(patch: Patch) -> None:
    """In the gradients only: what is told has the right ones."""
    count, weigh, own = together.count, row.weigh, []

    def count_and_note(world: World, counts: TermCounts) -> TermCounts:
        own[:] = [counts]
        return count(world, counts)

    patch.setattr(together, "count", count_and_note)
    patch.setattr(row, "weigh", lambda counts, **terms: weigh(own[0], **terms))


def bias_from_own_counts(patch: Patch) -> None:
    _own_load(patch, told=False)


def load_of_own_rows_told(patch: Patch) -> None:
    _own_load(patch, told=True)


def _own_load(patch: Patch, *, told: bool) -> None:
    gather, update, own = together.gather_rows, step.update_biases, []

    def gather_and_note(world: World, mine: Mapping[int, RowSums]) -> tuple[tuple[RowSums, ...], Tensor]:
        rows, load_LE = gather(world, mine)
        own[:] = [sum((one.load_LE for one in mine.values()), torch.zeros_like(load_LE))]
        return rows, own[0] if told else load_LE

    patch.setattr(together, "gather_rows", gather_and_note)
    patch.setattr(step, "update_biases", lambda model, load_LE, speed: update(model, own[0], speed))


# experts


def experts_averaged(patch: Patch) -> None:
    """Over the ranks that share them out, as if these were replicas."""
    reduce = Ownership.reduce

    def reduce_and_divide(self: Ownership, sums: ExactSum) -> dict[str, Tensor]:
        return {key: part / TWO_RANKS if ".experts." in key else part for key, part in reduce(self, sums).items()}

    patch.setattr(Ownership, "reduce", reduce_and_divide)


def gradients_of_the_second_source_dropped(patch: Patch) -> None:
    leaves = step.leaves
    patch.setattr(step, "leaves", lambda model: (one for one in leaves(model) if one[2] != 1))


def added_as_they_arrive(patch: Patch) -> None:
    """A token's results in the order of the experts, not in that in which the router chose them."""

    def combine(self: ExpertDispatcher, y_PD: Tensor, arrived: Arrived, shape: torch.Size) -> Tensor:
        y_PD = at_least_fp32(expert.exchange(y_PD, arrived.received, arrived.sent, self._group.handle))
        B, T, K = shape
        token_P = arrived.local.order_P // K
        return y_PD.new_zeros(B * T, y_PD.shape[1]).index_add(0, token_P, y_PD).unflatten(0, (B, T))

    patch.setattr(ExpertDispatcher, "combine", combine)


def rows_of_a_group_in_one_product(patch: Patch) -> None:
    apply = build.apply_experts
    patch.setattr(build, "apply_experts", lambda model, group, exact: apply(model, group, exact=False))


def everybody_has_the_first_experts(patch: Patch) -> None:
    """Each rank fills its experts with the initial values of those of rank 0."""
    initialize = build.initialize

    def initialize_as_first(model: Transformer, *rest: Any) -> None:
        held, model.held = model.held, range(len(model.held))
        initialize(model, *rest)
        model.held = held

    patch.setattr(build, "initialize", initialize_as_first)


# sums


def replicas_keep_their_own_sums(patch: Patch) -> None:
    """The gradients of experts are not brought together."""
    reduce = Ownership.reduce

    def reduce_dense(self: Ownership, sums: ExactSum) -> dict[str, Tensor]:
        own = {self.key(span): _read_local(self, sums, span) for span in self.spans if self.is_expert(span.parameter)}
        return reduce(self, sums) | own

    patch.setattr(Ownership, "reduce", reduce_dense)


def owner_groups_keep_their_own_sums(patch: Patch) -> None:
    """Ranks that own the same matrices do not bring their sums together."""
    merge = ExactReduction.merge

    def merge_in_group(self: ExactReduction, bounds_RP2: Tensor, ranks: Mapping[str, Collection[int]]) -> None:
        owners = self._ownership._world.owners.ranks
        merge(self, bounds_RP2, dict.fromkeys(self.totals(), owners) | dict(ranks))

    patch.setattr(ExactReduction, "merge", merge_in_group)
    patch.setattr(Ownership, "_between_owners", lambda self, sums: None)


def sums_added_in_floating_point(patch: Patch) -> None:
    """Each rank rounds its sums, then they are added."""

    def reduce(self: Ownership, sums: ExactSum) -> dict[str, Tensor]:
        found = {}
        for share in self.shares:
            for span in share.spans:
                total = _read_local(self, sums, span)
                dist.all_reduce(total, group=share.group.handle)
                if share.is_mine:
                    found[self.key(span)] = total
        return found

    patch.setattr(Ownership, "reduce", reduce)


def _read_local(ownership: Ownership, sums: ExactSum, span: Span) -> Tensor:
    first = ownership.first_row(span.parameter)
    return sums.read(span.parameter, slice(span.start - first, span.stop - first))
