"""Proves that `keel check parity` says yes to a right layout on both paths, and no when one rank does otherwise."""

import json
import os
import subprocess
import sys
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Literal

import pytest
from torch import Tensor

from launch.compose import compose
from tests.dist import ranks
from trainer.parallel.reduce import ExactSum
from trainer.parity import check, scale

ROOT = Path(__file__).resolve().parents[2]
Mistake = Literal["none", "gradient", "figure"]


def judge(rank: int, folder: Path, overrides: list[str], mistake: Mistake) -> None:
    """What a rank of `keel check parity` does; rank 0 leaves the comparison."""
    config = scale.scaled(compose(["device=cpu", *overrides]).config)
    if mistake == "gradient" and rank == 1:
        add = ExactSum.add

        def halved(self: ExactSum, name: str, leaf: Tensor) -> None:
            add(self, name, leaf / 2 if name.endswith("experts.w2") else leaf)

        ExactSum.add = halved
    parity = check.check(config, ranks.placement(rank, config.parallel.mesh.size, folder))
    if rank == 0:
        (folder / "told.json").write_text(json.dumps(check.as_json(parity)))


def told(processes: BaseContext, folder: Path, overrides: list[str], mistake: Mistake = "none") -> dict:
    size = compose(overrides).config.parallel.mesh.size
    ranks.spawn(processes, judge, size, folder, overrides, mistake)
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize("path", ["exact", pytest.param("fast", marks=pytest.mark.slow)])
def test_a_right_layout_keeps_its_promise(path: str, processes: BaseContext, tmp_path: Path) -> None:
    found = told(processes, tmp_path, ["parallel=cpu2", f"parallel.reduction={path}"])
    assert found["kept"]
    differing = [term["name"] for term in found["against_one"]["terms"] if term["different"]]
    assert bool(differing) == (path == "fast"), "rounded gradients leave other bits, integers the same"


def test_a_rank_that_halves_a_gradient_is_seen(processes: BaseContext, tmp_path: Path) -> None:
    found = told(processes, tmp_path, ["parallel=cpu2"], "gradient")
    assert not found["kept"]
    terms = {term["name"]: term for term in found["against_one"]["terms"]}
    assert terms["loss/lm"]["first"] > 1, "the first step's loss comes before the first update"
    assert terms["optim/grad_norm"]["first"] == 1
    assert any("experts" in name for name in found["against_one"]["weights"][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["recipe=flash", "parallel=cpu4"], ["recipe=pro", "parallel.data=1024", "parallel.expert=128", "threads=1"]],
)
def test_the_command_on_flash_and_pro(words: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "launch.main", "check", "parity", "device=cpu", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("verdict: the same bits as one process")
