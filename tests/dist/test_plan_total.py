"""Proves that the tensors of real ranks take what is planned: the most at a time in a step, to within 2 % of the total.

Every storage that a rank makes is followed, from the first of its model on. All parts are large here beside the little
that no plan counts: in some cases a row takes most, in others the update.
"""

import json
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from model import count_memory
from tests.dist import ranks
from tests.dist.ranks import Case
from tests.trainer import steps
from tests.trainer.peak import Peak
from tests.trainer.precision.recipes import recipe
from trainer import plan_memory, plan_rows
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import ALONE, start
from trainer.plan_parallel import layout
from trainer.schedule import StepPlan
from trainer.step import train_step

MODEL = ranks.model(
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 32, 0),
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=128,
    o_lora_rank=64,
    sliding_window=64,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=16,
    n_routed_experts=24,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
    hc_mult=4,
)
"""22 million parameters, most of them in experts."""
TOLERANCE = 0.02
ALONE_1, DATA_2, EXPERT_2 = Mesh(), Mesh(data=2, owners=2), Mesh(data=2, expert=2, owners=2)
BOTH_4, TWICE_4, EXPERT_4 = (
    Mesh(data=4, expert=2, owners=4),
    Mesh(data=4, expert=2, owners=2),
    Mesh(data=4, expert=4, owners=4),
)
DEEP = replace(MODEL, num_hidden_layers=6, compress_ratios=(0, 4, 32, 4, 32, 0, 0))
PIPE_4, FOLDED = Mesh(pipe=2, data=2, expert=2, owners=2), {"schedule": "dualpipev"}
FAST_ROUNDED = {"reduction": "fast", "stream": "bf16"}
FAST = {"parallel": {"reduction": "fast"}}
FAST_BF16 = {"parallel": {"reduction": "fast", "dense_reduction": "bf16"}}
FP8, FP8_FAST = {"precision": recipe("fp8")}, FAST_BF16 | {"precision": recipe("fp8")}
BLOCK, PARTS = {"recompute": ("block",)}, {"recompute": ("attention", "experts")}


def case_of(dtype: str, changes: Mapping[str, Any]) -> Case:
    return Case(dtype=dtype, changes={"model": MODEL, **changes})


def step_of(mesh: Mesh, length: int) -> StepPlan:
    """A row for each rank; in a pipeline enough to fill it."""
    rows = mesh.data * (2 * mesh.pipe + 1) if mesh.pipe > 1 else mesh.data
    return replace(steps.make_plan("sparse"), rows=rows, row_length=length)


def tell(rank: int, folder: Path, case: Case, mesh: Mesh, length: int) -> None:
    """Most bytes of a rank's tensors in a step, those held before it, and by how much its process grew."""
    world = start(mesh, ranks.placement(rank, mesh.size, folder), ranks.CPU) if mesh.size > 1 else ALONE
    before = resident_bytes()
    with Peak() as peak:
        built = ranks.built_of(case, mesh, world)
        held, peak.peak = peak.alive_bytes(), 0
        step = step_of(mesh, length)
        built.parts.stream.rows = steps.FixedStream(batch=steps.make_batch(rows=step.rows, length=length)).rows
        train_step(built.parts, step, lambda: False)
    told = {"peak": peak.peak, "held": held, "grown": resident_bytes() - before}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    world.close()


def resident_bytes() -> int:
    """The most that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


Told = list[dict[str, int]]


def measured(processes: BaseContext, case: Case, mesh: Mesh, length: int, folder: Path) -> Told:
    """By rank."""
    ranks.spawn(processes, tell, mesh.size, folder, case, mesh, length)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(mesh.size)]


def check(found: Told, case: Case, mesh: Mesh, length: int) -> None:
    of = layout(ranks.config_of(case, mesh), [step_of(mesh, length)])
    for rank, told in enumerate(found):
        planned = of.role_of(rank).memory
        assert told["held"] == pytest.approx(planned.held, rel=TOLERANCE)
        assert told["peak"] == pytest.approx(planned.total, rel=TOLERANCE)
        # A second opinion. The process also has what libraries need at first use, and what the allocator keeps for
        # later: 190 to 440 MB here, and no tensors.
        assert told["grown"] > 0.98 * planned.total


@pytest.mark.parametrize(
    ("mesh", "dtype", "changes", "length"),
    [
        pytest.param(ALONE_1, "bf16", {}, 1024, id="one process"),
        pytest.param(ALONE_1, "fp32", {}, 512, id="one process, fp32", marks=pytest.mark.slow),
        pytest.param(ALONE_1, "fp32", BLOCK, 2048, id="one process, blocks again", marks=pytest.mark.slow),
        pytest.param(ALONE_1, "bf16", PARTS, 1024, id="one process, parts again", marks=pytest.mark.slow),
        pytest.param(DATA_2, "fp32", {}, 1024, id="two", marks=pytest.mark.slow),
        pytest.param(DATA_2, "bf16", FAST_BF16, 1024, id="two, fast", marks=pytest.mark.slow),
        pytest.param(EXPERT_2, "bf16", BLOCK, 1024, id="two share out experts, blocks again", marks=pytest.mark.slow),
        pytest.param(EXPERT_2, "bf16", FP8, 1024, id="two share out experts, codes", marks=pytest.mark.slow),
        pytest.param(EXPERT_2, "bf16", FP8_FAST, 1024, id="two share out experts, codes, fast", marks=pytest.mark.slow),
        pytest.param(BOTH_4, "fp32", {}, 512, id="four", marks=pytest.mark.slow),
        pytest.param(BOTH_4, "fp32", FAST, 128, id="four, fast, short rows", marks=pytest.mark.slow),
        pytest.param(TWICE_4, "bf16", FAST_BF16, 1024, id="four, fast, owners twice", marks=pytest.mark.slow),
        pytest.param(TWICE_4, "bf16", BLOCK, 1024, id="four, blocks again", marks=pytest.mark.slow),
        pytest.param(BOTH_4, "fp32", PARTS, 1024, id="four, parts again", marks=pytest.mark.slow),
        pytest.param(EXPERT_4, "bf16", {}, 512, id="four share out experts", marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_is_planned(
    mesh: Mesh, dtype: str, changes: Mapping[str, Any], length: int, processes: BaseContext, tmp_path: Path
) -> None:
    case = case_of(dtype, changes)
    check(measured(processes, case, mesh, length, tmp_path), case, mesh, length)


@pytest.mark.parametrize(
    ("mesh", "dtype", "parallel", "length"),
    [
        pytest.param(Mesh(pipe=2), "fp32", {}, 256, id="1f1b"),
        pytest.param(Mesh(pipe=3), "fp32", {}, 512, id="1f1b on three", marks=pytest.mark.slow),
        pytest.param(Mesh(pipe=2), "bf16", {}, 512, id="1f1b, bf16", marks=pytest.mark.slow),
        pytest.param(Mesh(pipe=2), "fp32", FOLDED, 512, id="dualpipev", marks=pytest.mark.slow),
        pytest.param(Mesh(pipe=3), "fp32", FOLDED, 512, id="dualpipev on three", marks=pytest.mark.slow),
        pytest.param(Mesh(pipe=2), "fp32", FAST_ROUNDED, 512, id="1f1b, fast", marks=pytest.mark.slow),
        pytest.param(Mesh(pipe=2), "fp32", FOLDED | FAST_ROUNDED, 512, id="dualpipev, fast", marks=pytest.mark.slow),
        pytest.param(PIPE_4, "fp32", {}, 512, id="1f1b, experts shared out", marks=pytest.mark.slow),
    ],
)
def test_a_step_in_stages_takes_what_is_planned(
    mesh: Mesh, dtype: str, parallel: Mapping[str, Any], length: int, processes: BaseContext, tmp_path: Path
) -> None:
    case = case_of(dtype, {"model": DEEP, "parallel": parallel})
    check(measured(processes, case, mesh, length, tmp_path), case, mesh, length)


@pytest.fixture(scope="module")
def seen(processes: BaseContext, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What two ranks take that share out experts; a row takes most there."""
    return measured(processes, case_of("fp32", {}), EXPERT_2, 1024, tmp_path_factory.mktemp("seen"))


def test_two_ranks_that_share_out_experts_take_what_is_planned(seen: Told) -> None:
    check(seen, case_of("fp32", {}), EXPERT_2, 1024)


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "sums of 4 bytes": (plan_memory, "INT64_BYTES", 4),
    "experts not shared out": (plan_memory, "_held", lambda config, model: 24 * model.expert_elements),
    "no gradients": (plan_rows, "_leaves", lambda config, model, step, part: [("", 0)]),
    "an attention that keeps nothing": (count_memory, "attention", lambda *given: Counter()),
    "all rows in the experts at once": (
        plan_rows,
        "phases",
        lambda *given, apart, layers: count_memory.phases(*given, layers=layers),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str, seen: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises(AssertionError):
        check(seen, case_of("fp32", {}), EXPERT_2, 1024)


def test_a_recomputation_that_is_not_planned_is_caught(seen: Told) -> None:
    with pytest.raises(AssertionError):
        check(seen, case_of("fp32", BLOCK), EXPERT_2, 1024)
