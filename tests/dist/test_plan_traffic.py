"""Proves that the traffic planned for a step is what its ranks give to torch.distributed, call by call, to the byte."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from model.config import InitConfig
from model.logical import logical_tensors
from optim import zero
from tests.dist import ranks
from tests.dist.ranks import LENGTH, Case
from tests.trainer.precision.recipes import recipe
from trainer import plan_traffic
from trainer.parallel.fast import FastSum
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import World, start
from trainer.plan_memory import is_trained
from trainer.plan_parallel import layout
from trainer.plan_traffic import Collective
from trainer.step import frozen_groups

ROWS = (4, 3, 5)
"""One step of each attention mode; the last rounds have ranks without a row."""
EXACT, FAST = Case(rows=ROWS), Case(rows=ROWS, changes={"parallel": {"reduction": "fast"}})
FAST_BF16 = Case(rows=ROWS, dtype="bf16", changes={"parallel": {"reduction": "fast", "dense_reduction": "bf16"}})
AGAIN = Case(rows=ROWS, changes={"recompute": ("experts",)})
WHOLE_AGAIN = Case(rows=ROWS, changes={"recompute": ("block", "attention")})
DATA_2, EXPERT_2 = Mesh(data=2, owners=2), Mesh(data=2, expert=2, owners=2)
BOTH, TWICE, LONE = Mesh(data=4, expert=2, owners=4), Mesh(data=4, expert=2, owners=2), Mesh(data=2, owners=1)
CODED = Case(rows=ROWS, dtype="bf16", changes={"precision": recipe("fp8_fp4", "bf16", LENGTH * ROWS[0])})
"""FP8, and experts that turn to FP4 after the first step."""
DEEP = ranks.model(num_hidden_layers=4, compress_ratios=(4, 8, 4, 8, 0))
INIT = InitConfig(std=0.05, hc_scale=0.02)
"""A scale that the first step does not take to zero, for what has no gradient is not sent."""
PIPED, FOLDED, PIPED_FAST = (
    Case(rows=(4, 5, 7), changes={"model": DEEP, "init": INIT, "parallel": parallel})
    for parallel in ({}, {"schedule": "dualpipev"}, {"reduction": "fast", "stream": "bf16"})
)
KINDS = {"all_to_all_single": 1, "reduce": 0, "broadcast": 0, "all_reduce": 0, "all_gather": 1}
"""The functions that are watched, and the place of what a rank gives among their arguments."""
AXES = ("data", "expert", "replicas", "owners", "same_owners", "ends")
Told = dict[str, list[int]]
"""Calls and bytes by "kind axis"."""


def watch(world: World, seen: Counter[str], sizes: Counter[str]) -> None:
    """Count what this process gives to the groups of the mesh; a few numbers go to `control`, which is none."""
    names = {id(getattr(world, axis).handle): axis for axis in AXES if getattr(world, axis).handle is not None}

    def watched(kind: str, place: int, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        axis = names.get(id(named.get("group")))
        if axis is not None:
            assert isinstance(given[place], Tensor)
            key = f"{kind.removesuffix('_single')} {axis}"
            seen[key] += 1
            sizes[key] += given[place].numel() * given[place].element_size()
        return function(*given, **named)

    for kind, place in KINDS.items():
        setattr(dist, kind, partial(watched, kind, place, getattr(dist, kind)))


def watch_streams(seen: Counter[str], sizes: Counter[str]) -> None:
    """Count what DeepSpeed sends for this process, one by one or in batches; shapes, which are integers, are not."""

    def note(tensor: Tensor) -> None:
        if tensor.is_floating_point():
            seen["send pipe"] += 1
            sizes["send pipe"] += tensor.numel() * tensor.element_size()

    def send(tensor: Tensor, *given: Any, **named: Any) -> Any:
        note(tensor)
        return alone(tensor, *given, **named)

    def batch(transfers: list[Any]) -> Any:
        for one in transfers:
            if one.op.__name__ == "isend":
                note(one.tensor)
        return together(transfers)

    alone, together = dist.send, dist.batch_isend_irecv
    dist.send, dist.batch_isend_irecv = send, batch


def tell(rank: int, folder: Path, case: Case, mesh: Mesh) -> None:
    """What a rank gives in each step."""
    world = start(mesh, ranks.placement(rank, mesh.size, folder), ranks.CPU)
    built = ranks.built_of(case, mesh, world)
    seen, sizes, told = Counter[str](), Counter[str](), []
    watch(world, seen, sizes)
    watch_streams(seen, sizes)
    for number in range(len(case.rows)):
        ranks.step_of(built, case, number)
        built.parts.handout.settle()
        told.append({key: [seen[key], sizes[key]] for key in seen})
        if isinstance(built.parts.sums, FastSum):
            told[-1]["came"] = [0, sum(one.came.nbytes for of in built.parts.sums._launched.values() for one in of)]
        seen.clear()
        sizes.clear()
    (folder / f"{rank}.json").write_text(json.dumps(told))
    world.close()


def planned(case: Case, mesh: Mesh) -> list[Told]:
    config = ranks.config_of(case, mesh)
    stages = layout(config, [ranks.plan_of(number, case) for number in range(len(case.rows))]).traffic
    return [added(stage) for stage in stages]


def added(stage: tuple[Collective, ...]) -> Told:
    found: Told = {}
    for one in stage:
        calls, sizes = found.setdefault(f"{one.kind} {one.axis}", [0, 0])
        found[f"{one.kind} {one.axis}"] = [calls + one.calls, sizes + one.payload_bytes]
    return found


def sent(processes: BaseContext, case: Case, mesh: Mesh, folder: Path) -> list[Told]:
    """Of all ranks together, by step."""
    ranks.spawn(processes, tell, mesh.size, folder, case, mesh)
    of_ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(mesh.size)]
    return [
        {key: [sum(one.get(key, (0, 0))[at] for one in step) for at in (0, 1)] for key in {*chain(*step)} - {"came"}}
        for step in zip(*of_ranks, strict=True)
    ]


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        pytest.param(AGAIN, EXPERT_2, id="experts computed again"),
        pytest.param(WHOLE_AGAIN, EXPERT_2, id="blocks computed again"),
        pytest.param(EXACT, TWICE, id="exact, owners twice"),
        pytest.param(FAST, DATA_2, id="fast, data"),
        pytest.param(FAST_BF16, TWICE, id="fast in bf16, owners twice"),
        pytest.param(CODED, EXPERT_2, id="fp8 and fp4 codes"),
        pytest.param(CODED, BOTH, id="fp8 and fp4 codes, both", marks=pytest.mark.slow),
        pytest.param(EXACT, LONE, id="exact, every rank owns all", marks=pytest.mark.slow),
        pytest.param(FAST, LONE, id="fast, every rank owns all", marks=pytest.mark.slow),
        pytest.param(EXACT, BOTH, id="exact, both", marks=pytest.mark.slow),
        pytest.param(FAST, BOTH, id="fast, both", marks=pytest.mark.slow),
    ],
)
def test_ranks_send_what_is_planned(case: Case, mesh: Mesh, processes: BaseContext, tmp_path: Path) -> None:
    found, expected = sent(processes, case, mesh, tmp_path), planned(case, mesh)
    assert found == expected


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        pytest.param(PIPED, Mesh(pipe=2), id="1f1b"),
        pytest.param(FOLDED, Mesh(pipe=2), id="dualpipev", marks=pytest.mark.slow),
        pytest.param(PIPED, Mesh(pipe=2, data=2, expert=2, owners=2), id="1f1b, experts", marks=pytest.mark.slow),
        pytest.param(PIPED_FAST, Mesh(pipe=2, data=2, owners=2), id="1f1b, fast", marks=pytest.mark.slow),
        pytest.param(PIPED, Mesh(pipe=4), id="1f1b on four", marks=pytest.mark.slow),
    ],
)
def test_pipe_ranks_send_what_is_planned(case: Case, mesh: Mesh, processes: BaseContext, tmp_path: Path) -> None:
    """And two numbers for the embedding that both ends use, on the exact path."""
    found, expected = sent(processes, case, mesh, tmp_path), planned(case, mesh)
    for told in found if case is PIPED else ():
        calls, size = told.pop("all_gather ends")
        assert (calls, size) == (2 * mesh.data, 2 * mesh.data * 16)
    assert found == expected


@pytest.mark.parametrize("mesh", [DATA_2, pytest.param(TWICE, marks=pytest.mark.slow)], ids=["data", "owners twice"])
def test_buffers_of_the_fast_path_are_what_leaves_and_comes(mesh: Mesh, processes: BaseContext, tmp_path: Path) -> None:
    """In the sparse step, which trains everything."""
    ranks.spawn(processes, tell, mesh.size, tmp_path, FAST, mesh)
    config = ranks.config_of(FAST, mesh)
    roles = layout(config, [ranks.plan_of(2, FAST)])
    for rank in range(mesh.size):
        told = json.loads((tmp_path / f"{rank}.json").read_text())[2]
        given = sum(told[f"all_to_all {axis}"][1] for axis in ("owners", "replicas") if f"all_to_all {axis}" in told)
        assert roles.role_of(rank).memory.buffers == given + told["came"][1]


@pytest.fixture(scope="module")
def seen(processes: BaseContext, tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """What two ranks give each other that share out experts, on the exact path."""
    return sent(processes, EXACT, EXPERT_2, tmp_path_factory.mktemp("seen"))


def test_ranks_that_share_out_experts_send_what_is_planned(seen: list[Told]) -> None:
    assert seen == planned(EXACT, EXPERT_2)


def tell_the_rest(rank: int, folder: Path, case: Case, mesh: Mesh) -> None:
    """What a rank gives to `control` in each step; objects are gathered as tensors by the module's own functions."""
    world = start(mesh, ranks.placement(rank, mesh.size, folder), ranks.CPU)
    built = ranks.built_of(case, mesh, world)
    seen: list[tuple[str, int]] = []

    def watched(kind: str, place: int, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if world.control.handle in (*given, named.get("group")):
            seen.append((kind, given[place].numel() * given[place].element_size()))
        return function(*given, **named)

    for kind, place in KINDS.items():
        function = partial(watched, kind, place, getattr(distributed_c10d, kind))
        setattr(distributed_c10d, kind, function)
        setattr(dist, kind, function)
    told = []
    for number in range(len(case.rows)):
        ranks.step_of(built, case, number)
        told.append(list(seen))
        seen.clear()
    (folder / f"{rank}.json").write_text(json.dumps(told))
    world.close()


def test_what_is_not_counted_is_little(processes: BaseContext, tmp_path: Path) -> None:
    """Counts of terms, the first row at fault, loads of layers; gathered: losses of rows, squares, RMS by group.

    What is gathered is a text of any length, after its size in 8 bytes: 250 a row and layer, and less than 2000 more.
    """
    ranks.spawn(processes, tell_the_rest, TWICE.size, tmp_path, EXACT, TWICE)
    layers = ranks.MODEL.num_hidden_layers + ranks.MODEL.num_nextn_predict_layers
    for rank in range(TWICE.size):
        for rows, step in zip(ROWS, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            numbers = [size for kind, size in step if kind == "all_reduce"]
            assert numbers == [5 * 8, 8, layers * ranks.MODEL.n_routed_experts * 8]
            gathered = [size for kind, size in step if kind == "all_gather"]
            assert [kind for kind, _ in step if kind not in ("all_reduce", "all_gather")] == []
            assert gathered[::2] == [8, 8, 8]
            assert sum(gathered[1::2]) < 250 * layers * -(-rows // TWICE.size) + 2000


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "all groups in all modes": (plan_traffic, "is_trained", lambda group, mode: True),
    "sums of 4 bytes": (plan_traffic, "INT64_BYTES", 4),
    "a call for each member": (zero, "spans", lambda members: list(members)),
    "weights in fp64": (plan_traffic, "_weight_bytes", lambda model, one, width, formats: 8 * elements(model, [one])),
}
elements = plan_traffic._elements


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str, seen: list[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    assert seen != planned(EXACT, EXPERT_2)


def test_a_recomputation_that_is_not_planned_is_caught(seen: list[Told]) -> None:
    assert seen != planned(AGAIN, EXPERT_2)


def test_a_mode_trains_what_the_step_trains() -> None:
    groups = {one.parameter: one.group for one in logical_tensors(ranks.MODEL)}
    for mode in ranks.MODES:
        frozen = frozen_groups(mode, groups)
        assert {group for group in groups.values() if not is_trained(group, mode)} == frozen


def test_what_is_sent_is_what_leaves_a_rank() -> None:
    """By a ring of n, (n - 1) / n of what is given, twice where all get the sum; one's own to the n - 1 others."""
    for kind, times in plan_traffic.SENT.items():
        one = plan_traffic._collective("", kind, "data", 4, 1, 1000)
        assert one.sent_bytes == times * 750
    assert plan_traffic._gather("", "data", 4, 1, 1000).sent_bytes == 3000
