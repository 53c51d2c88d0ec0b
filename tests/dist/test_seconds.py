"""Proves that what a stage waits after its last row, for checks and for other ranks, is not in its pipe seconds."""

import json
import time
from multiprocessing.context import BaseContext
from pathlib import Path

from tests.dist import ranks
from tests.dist.ranks import Case
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import start
from trainer.step import train_step

CASE, MESH = Case(rows=(4,)), Mesh(pipe=2)
CHECK_S = 5.0


def tell(rank: int, folder: Path) -> None:
    """The last stage checks for long, and the first waits for it."""
    world = start(MESH, ranks.placement(rank, MESH.size, folder), ranks.CPU)
    built = ranks.built_of(CASE, MESH, world)
    built.parts.stream.rows = ranks.rows_of_step(0, CASE.rows[0]).rows
    began = time.perf_counter()
    check_s = CHECK_S if rank else 0
    result = train_step(built.parts, ranks.plan_of(0, CASE), lambda: False, lambda: time.sleep(check_s))
    assert result is not None
    told = {"step": time.perf_counter() - began, "pipe": result.seconds.pipe}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    world.close()


def test_what_comes_after_the_last_row_is_no_part_of_the_pipe(processes: BaseContext, tmp_path: Path) -> None:
    ranks.spawn(processes, tell, MESH.size, tmp_path)
    for rank in range(MESH.size):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["step"] > CHECK_S
        assert 0 < told["pipe"] < told["step"] - CHECK_S
