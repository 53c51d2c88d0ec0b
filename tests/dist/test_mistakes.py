"""Negative controls: mistakes of many ranks, each of which the comparison that passes without it must see."""

from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from optim.config import OptimConfig
from tests.dist import mistakes, mistakes_owners, mistakes_pipe, ranks
from tests.dist.ranks import Case, Plant, Steps
from trainer.parallel.mesh import Mesh

DATA, EXPERT, TWICE = Mesh(data=2, owners=2), Mesh(data=2, expert=2, owners=2), Mesh(data=4, owners=2)
"""TWICE: every dense matrix has two owners."""
PIPE = Mesh(pipe=2)
CASE = Case(rows=(5, 1, 2))
"""Dense, warm-up, sparse; in some rounds a rank has no row."""
CLIPPED = replace(CASE, changes={"optim": OptimConfig(clip_norm=0.1)})
HASHLESS = replace(CASE, changes={"model": ranks.model(num_hash_layers=0)})
SAVED, SAVED_BF16 = replace(CASE, saved_after=1), replace(CASE, saved_after=1, dtype="bf16")

# What must be among the differences: a figure of a step, or a tensor at the end.
MISTAKES: dict[Plant, tuple[Case, Mesh, str]] = {
    mistakes.neighbours_row: (CASE, DATA, "step 0 row 1/lm"),
    mistakes.everybody_reads_the_same_rows: (CASE, DATA, "step 0 row 1/lm"),
    mistakes.a_rank_without_a_row_takes_the_last: (CASE, DATA, "step 0 optim/grad_norm"),
    mistakes.denominators_of_own_rows: (CASE, DATA, "step 0 optim/grad_norm"),
    mistakes.bias_from_own_counts: (CASE, DATA, "model/layers.1.ffn.gate.bias"),
    mistakes.load_of_own_rows_told: (CASE, DATA, "step 0 router/load_LE"),
    mistakes.experts_averaged: (CASE, EXPERT, "step 0 optim/grad_norm"),
    mistakes.gradients_of_the_second_source_dropped: (CASE, EXPERT, "step 0 optim/grad_norm"),
    mistakes.added_as_they_arrive: (CASE, EXPERT, "step 0 optim/grad_norm"),
    mistakes.rows_of_a_group_in_one_product: (CASE, EXPERT, "momentum/layers.0.ffn.experts.w1"),
    mistakes.everybody_has_the_first_experts: (CASE, EXPERT, "step 0 row 0/lm"),
    mistakes.replicas_keep_their_own_sums: (CASE, DATA, "step 0 optim/grad_norm"),
    mistakes.owner_groups_keep_their_own_sums: (CASE, TWICE, "step 0 optim/grad_norm"),
    mistakes.sums_added_in_floating_point: (CASE, DATA, "momentum/layers.0.attn.wkv.weight"),
    mistakes_owners.a_rank_dropped_from_the_norm: (CASE, DATA, "step 0 optim/grad_norm"),
    mistakes_owners.squares_rounded_on_each_rank: (CASE, DATA, "step 0 optim/grad_norm"),
    mistakes_owners.every_owner_of_the_same_is_counted: (CASE, TWICE, "step 0 optim/grad_norm"),
    mistakes_owners.clip_by_the_own_norm: (CLIPPED, DATA, "step 0 optim/clip_scale"),
    mistakes_owners.an_owner_updates_twice: (CASE, DATA, "step 1 row 0/lm"),
    mistakes_owners.one_weight_is_not_handed_out: (
        CASE,
        DATA,
        "model/layers.0.attn.wo_b.weight: not the same on rank 1",
    ),
    mistakes_owners.a_rank_keeps_the_weights_before: (
        CASE,
        DATA,
        "model/layers.0.attn.wo_b.weight: not the same on rank 1",
    ),
    mistakes_owners.momentum_of_another_owner: (SAVED, DATA, "momentum/"),
    mistakes_owners.masters_from_the_weights: (SAVED_BF16, DATA, "master/"),
    mistakes_owners.biases_of_one_rank_not_restored: (
        SAVED,
        DATA,
        "model/layers.1.ffn.gate.bias: not the same on rank 1",
    ),
    mistakes_pipe.embedding_not_added_between_the_ends: (CASE, PIPE, "model/embed.weight: not the same on rank 1"),
    mistakes_pipe.embedding_counted_on_both_ends: (CASE, PIPE, "step 0 optim/grad_norm"),
    mistakes_pipe.streams_rounded_on_their_way: (CASE, PIPE, "step 0 row 0/lm"),
    mistakes_pipe.last_stage_draws_the_row_before: (CASE, PIPE, "step 0 row 1/lm"),
    mistakes_pipe.loads_of_the_first_layers_on_every_stage: (CASE, PIPE, "model/layers.1.ffn.gate.bias"),
    mistakes_pipe.no_balance_loss_before_the_last_stage: (HASHLESS, PIPE, "step 0 optim/grad_norm"),
    mistakes_pipe.gradients_of_a_row_left_for_the_next: (CASE, PIPE, "momentum/layers.0.attn.wkv.weight"),
    mistakes_pipe.gradient_of_the_streams_halved: (CASE, PIPE, "step 0 optim/grad_norm"),
}
"""By mistake: a case that is right without it, the layout, and what must be seen."""


def differences(
    case: Case, mesh: Mesh, alone: Callable[[Case], Steps], processes: BaseContext, folder: Path
) -> list[str]:
    """The one check: the steps of many ranks beside those of one process."""
    return ranks.differences(alone(case), ranks.run(processes, case, mesh, folder))


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        (CASE, DATA),
        (CASE, EXPERT),
        (CASE, TWICE),
        (CLIPPED, DATA),
        (SAVED, DATA),
        (SAVED_BF16, DATA),
        (CASE, PIPE),
        (HASHLESS, PIPE),
    ],
    ids=["data", "expert", "twice", "clipped", "saved", "saved-bf16", "pipe", "hashless"],
)
def test_without_a_mistake_there_is_no_difference(
    case: Case, mesh: Mesh, alone: Callable[[Case], Steps], processes: BaseContext, tmp_path: Path
) -> None:
    assert differences(case, mesh, alone, processes, tmp_path) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(
    mistake: Plant, alone: Callable[[Case], Steps], processes: BaseContext, tmp_path: Path
) -> None:
    case, mesh, seen = MISTAKES[mistake]
    found = differences(replace(case, plant=mistake), mesh, alone, processes, tmp_path)
    assert [line for line in found if line.startswith(seen)], f"{seen} is not among {found[:9]}"
