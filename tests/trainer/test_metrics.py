"""Proves that each metric is the ratio its table says, whatever the order of the rows; each name is in the table."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from model.losses import TermCounts
from trainer import metrics
from trainer.row import RowSums

COUNTS = TermCounts(lm=20, mtp=10, tokens=30, mtp_tokens=25, indexer=15)


def make_row(scale: float, loads: list[list[int]]) -> RowSums:
    """Three layers (hash-routed with an indexer, learned, the MTP block)."""
    return RowSums(
        lm=40.0 * scale,
        mtp=30.0 * scale,
        balance_L=(None, 33.0 * scale, 27.0 * scale),
        indexer_L=(6.0 * scale, None, None),
        load_LE=torch.tensor(loads),
        entropy_L=(90.0 * scale, 30.0 * scale, 60.0 * scale),
        recall_L=((int(8 * scale), int(16 * scale)), None, None),
        source=0,
        targets=0,
        layers=(0, 1, 2),
    )


def load(rows: list[RowSums]) -> Tensor:
    return torch.stack([row.load_LE for row in rows]).sum(0)


ROWS = [make_row(0.25, [[9, 0], [3, 1], [2, 2]]), make_row(0.75, [[0, 9], [5, 1], [0, 4]])]


def test_losses_are_sums_over_counts_and_means_over_layers() -> None:
    assert metrics.losses(ROWS, COUNTS) == {
        "loss/lm": 40 / 20,
        "loss/mtp": 30 / 10,
        "loss/balance": (33 + 27) / 2 / 30,
        "loss/indexer": 6 / 15,
    }


def test_routing_is_of_the_learned_layers() -> None:
    found = metrics.routing(ROWS, COUNTS, load(ROWS))
    assert found["router/load_max_ratio"] == (8 / 5 + 6 / 4) / 2
    assert found["router/entropy_nats"] == (30 + 60) / (30 * 2)
    assert found["router/dead_experts"] == 0


def test_dead_experts_are_those_without_a_token_in_all_rows() -> None:
    loads = [[[9, 0], [0, 4], [2, 0]], [[9, 0], [0, 6], [0, 4]]]
    rows = [make_row(0.5, load_LE) for load_LE in loads]
    assert metrics.routing(rows, COUNTS, load(rows))["router/dead_experts"] == 1, "hash layers do not count"


def test_the_load_of_ranks_is_that_of_their_experts_together() -> None:
    load_LE = torch.tensor([[9, 1, 2, 0], [3, 3, 3, 3]])
    assert metrics.rank_load(load_LE, 2) == (10 / 6 + 1) / 2
    assert metrics.rank_load(load_LE, 4) == (9 / 3 + 1) / 2
    assert metrics.rank_load(load_LE, 1) == 1


def test_losses_by_source_are_over_the_targets_of_its_rows() -> None:
    """Two rows of source 0, one of source 2, none of source 1, and one of source 3 without a target."""
    of_rows = [(6.0, 0, 2), (9.0, 2, 2), (8.0, 0, 3), (0.0, 3, 0)]
    rows = [replace(ROWS[0], lm=nats, source=source, targets=targets) for nats, source, targets in of_rows]
    found = metrics.by_source(rows, ("books", "web", "code", "empty"))
    assert found == {"loss/source/books": 14 / 5, "loss/source/code": 9 / 2}


def test_validation_counts_bits_over_the_bytes_of_all_targets() -> None:
    found = metrics.validation(ROWS, COUNTS, 50, load(ROWS))
    assert found == {
        "validation/loss": 2.0,
        "validation/bits_per_byte": 40 / math.log(2) / 50,
        "validation/mtp_loss": 3.0,
        "validation/load_max_ratio": metrics.routing(ROWS, COUNTS, load(ROWS))["router/load_max_ratio"],
        "indexer/kl_nats": 0.4,
        "indexer/recall": 0.5,
        "indexer/recall_L": [0.5, None, None],
    }


def test_what_a_stage_does_not_have_is_left_out() -> None:
    """Dense attention: no indexer. All layers hash-routed: no balance. No MTP target in the step."""
    plain = [replace(row, indexer_L=(None,) * 3, balance_L=(None,) * 3, recall_L=(None,) * 3) for row in ROWS]
    counts = replace(COUNTS, mtp=0)
    assert metrics.losses(plain, counts).keys() == {"loss/lm"}
    assert metrics.routing(plain, counts, load(plain)) == {}
    assert metrics.validation(plain, counts, 50, load(plain)).keys() == {"validation/loss", "validation/bits_per_byte"}


def test_no_counts_are_no_division_by_zero() -> None:
    silent = [replace(make_row(0.0, [[0, 0]] * 3), recall_L=(None,) * 3)]
    found = metrics.losses(silent, TermCounts()) | metrics.routing(silent, TermCounts(), load(silent))
    assert found.pop("router/dead_experts") == 4
    found |= metrics.validation(silent, TermCounts(), 0, load(silent))
    assert set(found.values()) == {0.0}


def test_the_order_of_rows_changes_no_bit() -> None:
    """With numbers whose plain sum depends on the order."""
    numbers = [0.1, 1e16, 0.2, -1e16, 0.3]
    assert sum(numbers) != sum(reversed(numbers))
    rows = [replace(ROWS[0], lm=n, balance_L=(None, n, 1.0), indexer_L=(n, None, None)) for n in numbers]
    assert metrics.losses(rows, COUNTS) == metrics.losses(rows[::-1], COUNTS)
    assert metrics.losses(rows, COUNTS)["loss/lm"] == math.fsum(numbers) / 20


def test_every_name_is_in_the_table() -> None:
    assert all(metrics.is_known(name) for name in [*metrics.METRICS, "optim/update_rms/experts", "loss/source/stdlib"])
    assert not any(metrics.is_known(name) for name in ("loss/lmm", "loss/source/", "optim/update", "sourc/x", ""))
    assert all(text for text in (metrics.METRICS | metrics.FAMILIES).values())
