"""Proves what the fast path promises: the same bits again on a layout, gradients as right as they travel, overlap."""

from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

from model.transformer import Transformer
from tests.dist import ranks
from tests.dist.ranks import Case
from trainer.parallel import fast as fast_path
from trainer.parallel.fast import FastSum, bucket_of, buckets
from trainer.parallel.mesh import Mesh
from trainer.parallel.owners import Ownership
from trainer.parallel.world import start

LAYOUT = Mesh(data=4, expert=2, owners=2)
ONE_STEP = (5,)
"""Rows of a single step: one rank of four has two."""


def fast(rows: tuple[int, ...], dense: str = "fp32", dtype: str = "fp32") -> Case:
    parallel = {"reduction": "fast", "dense_reduction": dense}
    return Case(rows=rows, dtype=dtype, changes={"parallel": parallel})


def test_the_same_bits_again(processes: BaseContext, tmp_path: Path) -> None:
    case = fast((4, 3, 5, 1), "bf16", "bf16")
    again = [ranks.run(processes, case, LAYOUT, tmp_path / name) for name in ("first", "second")]
    assert ranks.differences(*again) == []


@pytest.mark.parametrize("dense", ["fp32", "bf16"])
def test_gradients_are_those_of_one_process_as_far_as_they_travel(
    dense: str, processes: BaseContext, tmp_path: Path
) -> None:
    """After one step momentum is the clipped gradient. On one process: exact sums."""
    alone = ranks.run(processes, Case(rows=ONE_STEP), Mesh(), tmp_path)
    found = ranks.run(processes, fast(ONE_STEP, dense), LAYOUT, tmp_path)
    errors = {
        name: relative(found.tensors[name], alone.tensors[name])
        for name in alone.tensors
        if name.startswith("momentum/") and alone.tensors[name].any()
    }
    experts = {name: error for name, error in errors.items() if ".experts." in name}
    rest = {name: error for name, error in errors.items() if name not in experts}
    # fp32 sums of five rows and a norm; bf16 has 8 bits: a stochastically rounded number is off by less than 2^-7.
    slack = {"fp32": 1e-5, "bf16": 2.0**-7}
    assert max(rest.values()) < slack[dense], rest
    assert max(experts.values()) < slack["bf16"], experts
    # They did travel in bf16: exact ones would be some 1e-7 apart.
    assert min(experts.values()) > 1e-4
    assert dense == "fp32" or max(rest.values()) > 1e-4


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("length", [7, 2, 1])
def test_sums_of_owners_of_the_same_are_added_in_their_order(
    length: int, processes: BaseContext, tmp_path: Path
) -> None:
    """Parts of 3, 2 and 2 numbers, and none for some; in fp32, so that another order has other bits."""
    ranks.spawn(processes, add_between_owners, 3, tmp_path, length)
    first_P, *others = (own_numbers(rank, length) for rank in range(3))
    for other_P in others:
        first_P = first_P + other_P
    for rank in range(3):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), first_P)


def own_numbers(rank: int, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def add_between_owners(rank: int, folder: Path, length: int) -> None:
    mesh = Mesh(data=3, owners=1)
    world = start(mesh, ranks.placement(rank, mesh.size, folder), ranks.CPU)
    ownership = Ownership([], {}, Transformer(ranks.MODEL), world)
    torch.save(ownership.sum_between_owners(own_numbers(rank, length)), folder / f"{rank}.pt")
    world.close()


def test_layers_leave_while_the_backward_pass_goes_on(processes: BaseContext, tmp_path: Path) -> None:
    ranks.spawn(processes, note_launches, 2, tmp_path, fast(ONE_STEP[:1]), Mesh(data=2, owners=2))
    for rank in range(2):
        noted: Mapping[str, bool] = torch.load(tmp_path / f"{rank}.pt")
        assert list(noted) == ["mtp.0", "layers.1", "layers.0", "rest"]
        assert [noted[name] for name in ("mtp.0", "layers.1")] == [True, True], "launched inside the backward pass"


def note_launches(rank: int, folder: Path, case: Case, mesh: Mesh) -> None:
    """Leaves, by bucket in the order of their leaving, whether a backward pass was going on."""
    noted: dict[str, bool] = {}
    send = FastSum._send

    def noting(self: FastSum, bucket: str) -> Any:
        noted[bucket] = torch._C._current_graph_task_id() != -1
        return send(self, bucket)

    FastSum._send = noting
    world = start(mesh, ranks.placement(rank, mesh.size, folder), ranks.CPU)
    # Sparse attention alone: in other stages parts of a layer are frozen, and what is not trained is not waited for.
    ranks.take(replace(case, rows=case.rows), mesh, world)
    torch.save(noted, folder / f"{rank}.pt")
    world.close()


@pytest.mark.parametrize("sizes", [[2, 7, 0, 1, 4, 9], [5, 5], [1], [23]])
def test_numbers_are_rounded_in_batches(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "CHUNK", 5)
    parts = torch.arange(sum(sizes)).split(sizes)
    batches = [torch.cat(batch) for batch in fast_path._batches(parts)]
    assert torch.cat(batches).tolist() == list(range(sum(sizes)))
    assert all(5 <= len(batch) < 10 for batch in batches[:-1])
    assert 0 < len(batches[-1]) < 10


def test_buckets_are_in_the_order_of_a_backward_pass() -> None:
    names = ["embed.weight", "layers.10.attn.wkv.weight", "layers.2.hc_attn_fn", "mtp.0.e_proj.weight", "norm.weight"]
    assert buckets(names) == ["mtp.0", "layers.10", "layers.2", "rest"]
    assert bucket_of("layers.10.ffn.experts.w1") == "layers.10"
    assert bucket_of("hc_head_fn") == "rest"
