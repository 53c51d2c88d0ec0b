"""Proves that a run on any layout begins at given weights as one process does, and that all ranks refuse wrong ones."""

import json
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from launch.main import main
from model.config import InitConfig
from tests.dist import ranks, sessions
from tests.dist.sessions import Session
from tests.runs import tiny
from tests.trainer import released_folder as made
from trainer.config import TrainConfig
from trainer.parallel.mesh import Mesh
from trainer.run import train

ConfigOf = Callable[[Path, Mesh], TrainConfig]


@pytest.fixture
def config_of(corpus: Path, tmp_path: Path) -> ConfigOf:
    """A run on a layout, begun at an import of made-up codes."""
    keys: dict[str, Any] = {key: value for key, value in asdict(ranks.MODEL).items() if key != "rope_scaling"}
    keys = json.loads(json.dumps(keys))
    folder = made.write(tmp_path / "released", keys, made.tensors(keys, exponents=(112, 118)))
    assert main(["import", str(folder), str(tmp_path / "import")]) == 0
    init = InitConfig(weights=str(tmp_path / "import"))
    return lambda runs_dir, mesh: sessions.config(corpus, runs_dir, mesh, init=init)


@pytest.mark.parametrize(
    "mesh", [Mesh(data=2, expert=2, owners=2), Mesh(pipe=2, data=2, expert=2, owners=2)], ids=sessions.name
)
def test_ranks_begin_where_one_process_begins(
    mesh: Mesh, processes: BaseContext, config_of: ConfigOf, tmp_path: Path
) -> None:
    """Experts and layers are shared out; after three steps every tensor of the checkpoint is the same."""
    assert train(config_of(tmp_path / "alone", sessions.ONE), stop_at=3) == 0
    session = Session(processes, config_of(tmp_path / "runs", mesh), 3)
    assert session.wait() == [0] * mesh.size, session.said()
    alone, shared = (tiny.final_tensors(tiny.only_run(tmp_path / folder)) for folder in ("alone", "runs"))
    assert tiny.different_tensors(alone, shared) == []
    other = sessions.config(Path(config_of(tmp_path, mesh).data.sources["text"].path), tmp_path / "other", sessions.ONE)
    assert train(other, stop_at=3) == 0
    assert tiny.different_tensors(alone, tiny.final_tensors(tiny.only_run(tmp_path / "other"))) != []


def test_weights_that_one_rank_finds_damaged_end_all(
    processes: BaseContext, config_of: ConfigOf, tmp_path: Path
) -> None:
    """The damage is in an expert that only the second rank reads; no run is made."""
    mesh = Mesh(data=2, expert=2, owners=2)
    file = tmp_path / "import" / "rank-00000.safetensors"
    manifest = json.loads((tmp_path / "import" / "manifest.json").read_bytes())
    piece = manifest["tensors"]["model/layers.1.ffn.experts.w2"]["pieces"][-1]
    content = bytearray(file.read_bytes())
    content[piece["start"]] ^= 1
    file.write_bytes(content)
    session = Session(processes, config_of(tmp_path / "runs", mesh))
    assert 0 not in session.wait(), session.said()
    assert "expected weights that verify" in session.said()
    assert not list((tmp_path / "runs").glob("*"))
