"""Proves that ranks on unlike machines or data refuse to start, and wait for the first one's reading however long."""

import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.dist import ranks, sessions
from tests.dist.ranks import Plant
from tests.runs import tiny
from trainer import ending, provenance, run
from trainer.config import ValidationConfig
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import start
from trainer.together import read_together
from trainer.validate import HeldOut

TWO = Mesh(data=2, owners=2)
PATIENCE_S = 2.0


def another_processor(patch: pytest.MonkeyPatch) -> None:
    """Rank 1's has other vectors."""
    facts = provenance.facts

    def facts_of_rank(**given: Any) -> dict[str, Any]:
        return facts(**given) | ({"cpu_capability": "other"} if dist.get_rank() == 1 else {})

    patch.setattr(provenance, "facts", facts_of_rank)


def another_text(patch: pytest.MonkeyPatch) -> None:
    """Rank 1 finds another one under the same path."""
    read = run.read_data

    def read_of_rank(*given: Any) -> Any:
        data = read(*given)
        return replace(data, fingerprint="other") if dist.get_rank() == 1 else data

    patch.setattr(run, "read_data", read_of_rank)


PLANTS = [(another_processor, "cpu_capability"), (another_text, "data_fingerprint")]


@pytest.mark.parametrize(("plant", "key"), PLANTS, ids=[key for _, key in PLANTS])
def test_unlike_ranks_do_not_start(
    plant: Plant, key: str, processes: BaseContext, corpus: Path, tmp_path: Path
) -> None:
    session = sessions.Session(processes, sessions.config(corpus, tmp_path / "runs", TWO), plant=plant)
    assert session.wait() == [1, 1]
    assert session.said().count(f"ValueError: rank 1 = {key} other: expected ") == TWO.size, session.said()
    assert not list((tmp_path / "runs").glob("*"))


def test_a_run_goes_on_with_like_ranks_only(processes: BaseContext, corpus: Path, tmp_path: Path) -> None:
    config = sessions.config(corpus, tmp_path / "runs", TWO)
    assert sessions.Session(processes, config, stop_at=2).wait() == [0, 0]
    session = sessions.Session(processes, config, plant=another_processor)
    assert session.wait() == [1, 1]
    assert "rank 1 = cpu_capability other" in session.said()
    assert tiny.only_run(tmp_path / "runs").history()[-1]["event"] == "end", "nothing has begun"


def test_the_others_wait_for_the_first_reading(processes: BaseContext, tmp_path: Path) -> None:
    """Longer than for anything else: of a new text it may take hours."""
    ranks.spawn(processes, read_slowly, 2, tmp_path)


def read_slowly(rank: int, folder: Path) -> None:
    world = start(TWO, ranks.placement(rank, TWO.size, folder), ranks.CPU, timedelta(seconds=PATIENCE_S))
    read_together(world, partial(time.sleep, 2 * PATIENCE_S if rank == 0 else 0))
    world.close()


def test_the_others_do_not_wait_for_the_bigram(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all ranks write together comes first: the first one's counting of a long text may outlast their patience."""
    calls = []
    for owner, name in ((ending, "_sample"), (HeldOut, "bigram")):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, inner=inner, name=name: calls.append(name) or inner(*given))
    assert run.train(tiny.config(corpus, tmp_path, validation=ValidationConfig(rows=2, bigram=True))) == 0
    assert calls == ["_sample", "bigram"]
