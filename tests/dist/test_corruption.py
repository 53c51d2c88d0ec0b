"""Proves that a bit flipped on one rank is found and named by all of them, and gets into no checkpoint."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from tests.dist import ranks, sessions
from tests.dist.ranks import Case
from tests.runs import children, tiny
from tests.trainer.flips import flip, tensors
from trainer import checkpoint, loop
from trainer.build import build
from trainer.config import ParallelConfig, TrainConfig
from trainer.device import settle
from trainer.folder import RunFolder
from trainer.guard import Corrupted, Guard
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import start
from trainer.run import train
from trainer.step import Parts, train_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """Turn round a bit of the first tensor on `rank` whose name begins with `kind` and has `part` in it.

    when: after the update of step `step`, before its rows are computed, or when it is about to be saved.
    """

    rank: int
    kind: str
    part: str = ""
    when: Literal["updated", "resting", "saved"] = "resting"
    step: int = 0
    bit: int = 5

    def turn(self, parts: Parts) -> str:
        """Turn the bit, or turn it back, if this is the rank; returns the tensor's name."""
        if parts.world.rank != self.rank:
            return ""
        name, tensor = next(
            (name, tensor)
            for name, tensor in tensors(parts).items()
            if name.startswith(self.kind) and self.part in name
        )
        flip(tensor, self.bit)
        return name


DENSE, EXPERTS = "model/layers.0.attn", "model/layers.1.ffn.experts.w"
BIAS, TABLE = "model/layers.1.ffn.gate.bias", "model/layers.0.ffn.gate.tid2eid"
ROWS = (4, 2, 3)
"""Of the steps before the flips: dense, warm-up, sparse; in the second and third some ranks of four have none."""


def look(rank: int, folder: Path, case: Case, mesh: Mesh, flips: Sequence[Flip]) -> None:
    """Take the steps, then flip each in turn and write down which tensor it was and what the guard says."""
    world = start(mesh, ranks.placement(rank, mesh.size, folder), ranks.CPU)
    config = ranks.config_of(case, mesh)
    settle(config)
    stream, done = SimpleNamespace(rows=None), len(case.rows)
    parts = build(config, SimpleNamespace(train=stream), ranks.CPU, world).parts
    guard = Guard(parts, 1)
    guard.begin(0)
    for number, rows in enumerate(case.rows):
        stream.rows = ranks.rows_of_step(number, rows).rows
        assert train_step(parts, ranks.plan_of(number, case), lambda: False, guard.before_update) is not None
        guard.after_step(number + 1, saves=False)
    told = []
    for one in flips:
        name, said = one.turn(parts), ""
        try:
            guard.after_step(done, saves=False) if one.when == "updated" else guard.before_update()
        except Corrupted as error:
            said = str(error)
        one.turn(parts)
        guard.after_step(done, saves=False)
        told.append((name, said))
    world.close()
    (folder / f"{rank}.json").write_text(json.dumps(told))


def found(processes: BaseContext, folder: Path, mesh: Mesh, flips: Sequence[Flip], **of: Any) -> list[tuple[str, str]]:
    """The flipped tensors and what all ranks say of each."""
    ranks.spawn(processes, look, mesh.size, folder, Case(rows=ROWS, **of), mesh, flips)
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(mesh.size)]
    for number in range(len(flips)):
        assert len({of_rank[number][1] for of_rank in told}) == 1, "ranks tell different things"
    return [(told[one.rank][number][0], told[0][number][1]) for number, one in enumerate(flips)]


def test_two_replicas_that_differ_are_both_named(processes: BaseContext, tmp_path: Path) -> None:
    mesh = Mesh(data=2, owners=2)
    kinds = (DENSE, EXPERTS, BIAS, TABLE)
    for name, said in found(processes, tmp_path, mesh, [Flip(rank=1, kind=kind, when="updated") for kind in kinds]):
        assert said.startswith(f"step 3: {name} on ranks 0, 1 = checksums "), said
        assert said.endswith(": expected the same bits")


def test_of_three_replicas_the_odd_one_is_named_with_the_state_that_all_of_them_own(
    processes: BaseContext, tmp_path: Path
) -> None:
    mesh = Mesh(data=3, owners=1)
    kinds = (DENSE, EXPERTS, BIAS, "optimizer/momentum/layers.0.attn", "optimizer/exp_avg/head", "optimizer/updates/")
    flips = [Flip(rank=number % 3, kind=kind, when="updated") for number, kind in enumerate(kinds)]
    for one, (name, said) in zip(flips, found(processes, tmp_path, mesh, flips), strict=True):
        assert said.startswith(f"step 3: {name} on rank {one.rank} = checksum "), said
        assert said.endswith("as on the other 2 ranks")


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_what_one_rank_owns_is_watched_while_it_rests(reduction: str, processes: BaseContext, tmp_path: Path) -> None:
    """With experts shared out, in bf16: also weights, which every rank knows of its own."""
    mesh = Mesh(data=4, expert=2, owners=4)
    flips = [
        Flip(rank=0, kind="optimizer/momentum/", part=".experts.w2"),
        Flip(rank=1, kind="optimizer/momentum/", part="attn"),
        Flip(rank=2, kind="optimizer/exp_avg/", part="embed"),
        Flip(rank=3, kind="optimizer/exp_avg_sq/", part="head"),
        Flip(rank=3, kind="optimizer/master/", part=".experts."),
        Flip(rank=2, kind=DENSE),
        Flip(rank=1, kind=EXPERTS),
        Flip(rank=0, kind=BIAS),
    ]
    changes = {"parallel": {"reduction": reduction}}
    told = found(processes, tmp_path, mesh, flips, dtype="bf16", changes=changes)
    for one, (name, said) in zip(flips, told, strict=True):
        tensor = said.removeprefix("step 4: ").partition(" on ")[0]
        assert tensor.partition("[")[0] == name.partition("[")[0] != "", said
        assert f" on rank {one.rank} = checksum " in said
        assert said.endswith("as after step 3; nothing has written to it since")


def train_flipped(rank: int, folder: Path, config: TrainConfig, one: Flip, stop_at: int) -> None:
    """Train as the command does, and flip a bit on the way."""
    log = folder / f"{rank}.log"
    children.begin(log, log)

    def take(parts: Any, plan: Any, *arguments: Any) -> Any:
        if one.when == "resting" and plan.step + 1 == one.step:
            one.turn(parts)
        result = train_step(parts, plan, *arguments)
        if one.when == "updated" and plan.step + 1 == one.step:
            one.turn(parts)
        return result

    def save(built: Any, outlets: Any, guard: Any, done: int, save: Any = loop.save) -> None:
        if one.when == "saved" and done == one.step:
            one.turn(built.parts)
        save(built, outlets, guard, done)

    loop.train_step, loop.save = take, save
    sys.exit(train(config, place=ranks.placement(rank, config.parallel.mesh.size, folder), stop_at=stop_at))


def trained(processes: BaseContext, config: TrainConfig, one: Flip, stop_at: int = sessions.EVER) -> tuple[Any, str]:
    """The exit codes, all alike, and what rank 0 wrote."""
    folder = Path(config.runs_dir).with_name("ranks")
    started = ranks.begin(processes, train_flipped, config.parallel.mesh.size, folder, config, one, stop_at)
    for child in started:
        child.join(ranks.PATIENCE_S)
    codes = {child.exitcode for child in started}
    for child in started:
        child.kill()
    assert len(codes) == 1, codes
    return codes.pop(), (folder / "0.log").read_text()


MOMENTUM = Flip(rank=1, kind="optimizer/momentum/", part=".experts.", step=5)
RUNS = [
    pytest.param(Mesh(data=3, owners=3), Flip(rank=2, kind=DENSE, when="saved", step=4), "rank 2", id="dense-3"),
    pytest.param(Mesh(data=2, expert=2), MOMENTUM, "rank 1", id="momentum-2"),
    pytest.param(Mesh(), Flip(rank=0, kind="optimizer/exp_avg/", step=3), "rank 0", id="moment-1"),
    pytest.param(
        Mesh(data=4, expert=2, owners=2),
        Flip(rank=2, kind=EXPERTS, when="updated", step=6),
        "ranks 0, 2",
        id="experts-4",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        Mesh(data=4, owners=4),
        Flip(rank=3, kind=BIAS, when="updated", step=8),
        "rank 3",
        id="bias-4",
        marks=pytest.mark.slow,
    ),
]
"""Layout, flip, who is named. Looks are after every second step, which are saved."""


@pytest.mark.parametrize(("mesh", "one", "named"), RUNS)
def test_a_run_stops_before_the_flip_is_saved_and_goes_on_as_if_nothing_had_been(
    mesh: Mesh, one: Flip, named: str, processes: BaseContext, corpus: Path, tmp_path: Path, run_alone: RunFolder
) -> None:
    config = sessions.config(corpus, tmp_path / "runs", mesh)
    code, said = trained(processes, config, one)
    assert code == 1
    run = tiny.only_run(Path(config.runs_dir))
    line, how = [line for line in said.splitlines() if "keel: error" in line or "go on" in line]
    assert line.startswith(f"keel: error: step {one.step}: {one.kind}")
    assert f" on {named} = checksum" in line
    assert how == f"the last checkpoint is kept; to go on from it: ./keel resume {run.path}"
    assert run.history()[-1]["reason"] == f"Corrupted: {line.removeprefix('keel: error: ')}"
    assert max(checkpoint.steps(run.checkpoints)) == (one.step - 1) // 2 * 2, "the last one before that step"
    assert train(replace(config, parallel=ParallelConfig())) == 0
    tiny.assert_same_run(run, run_alone)


def test_a_run_that_never_looks_saves_the_flip(
    processes: BaseContext, corpus: Path, tmp_path: Path, run_alone: RunFolder
) -> None:
    """The negative control: what the run above stops at would be in its checkpoint, which verifies."""
    mesh = Mesh(data=2, expert=2)
    config = sessions.config(corpus, tmp_path / "runs", mesh)
    config = replace(config, parallel=replace(config.parallel, check_every_steps=0))
    code, _ = trained(processes, config, MOMENTUM)
    assert code == 0
    run = tiny.only_run(Path(config.runs_dir))
    assert len(tiny.different_tensors(tiny.final_tensors(run), tiny.final_tensors(run_alone))) > 10
