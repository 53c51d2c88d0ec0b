"""Proves that a profile sees every row of its steps, names operations and memory, and changes no bit of the run."""

import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs import tiny
from trainer.config import ProfileConfig, TrainConfig
from trainer.debug import dearest, profile
from trainer.folder import RunFolder
from trainer.run import train

FIRST, LAST = 6, 7
ROWS = 6
"""Rows of the steps 6 and 7 of `tiny.schedule()`."""


def profiled(config: TrainConfig, steps: str) -> TrainConfig:
    return replace(config, profile=ProfileConfig(steps=steps))


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> TrainConfig:
    """Two threads, so that the profile has to see rows of both."""
    return tiny.config(corpus, tmp_path / "runs", threads=2)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run without a profile."""
    config = tiny.config(corpus, tmp_path_factory.mktemp("whole"), threads=2)
    assert train(config) == 0
    return tiny.only_run(Path(config.runs_dir))


@pytest.fixture(scope="module")
def watched(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """The same run with one, and what it printed."""
    config = tiny.config(corpus, tmp_path_factory.mktemp("watched"), threads=2)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "LARGE_BYTES", 1 << 40)
        patch.setattr(dearest, "LARGEST", 1 << 20)  # what other tests left alive in this process may be larger
        patch.setattr("trainer.progress.Progress.say", lambda self, text: said.append(text))
        assert train(profiled(config, f"{FIRST}..{LAST}")) == 0
    return tiny.only_run(Path(config.runs_dir)), "\n".join(said)


@pytest.fixture
def folder(watched: tuple[RunFolder, str]) -> Path:
    return watched[0].path / "profile" / f"step-{FIRST:06}-{LAST:06}"


def ranges(folder: Path) -> list[str]:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def folders(run: RunFolder) -> Sequence[str]:
    return sorted(path.name for path in (run.path / "profile").iterdir())


def test_no_bit_of_the_run_changes(watched: tuple[RunFolder, str], whole: RunFolder) -> None:
    tiny.assert_same_run(watched[0], whole)
    assert not (whole.path / "profile").exists()


def test_the_trace_has_every_row_and_module(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["memory.json", "table.md", "trace.json"]
    names = ranges(folder)
    assert names.count("model") == ROWS
    assert names.count("layers.1.attn.wo_b") == ROWS
    assert names.count("mtp.0.ffn.experts") == ROWS


def test_the_table_has_the_dearest_operations_and_is_printed(folder: Path, watched: tuple[RunFolder, str]) -> None:
    text = (folder / "table.md").read_text()
    assert text.strip() in watched[1]
    assert text.startswith(f"# steps {FIRST} to {LAST}: ")
    heading, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert heading == ["operation", "shapes of its inputs", "calls", "self time ms", "share"]
    times = [float(row[3]) for row in rows[1:]]
    assert len(times) == 10
    assert times == sorted(times, reverse=True)
    assert 0 < math.fsum(float(row[4].rstrip("%")) for row in rows[1:]) <= 100
    assert any(re.search(r"\b1x32x", row[1]) for row in rows[1:]), "a row of 32 tokens"


def test_memory_is_told_by_operation_and_by_name(folder: Path) -> None:
    told: dict[str, Any] = json.loads((folder / "memory.json").read_text())
    allocated = [entry["bytes"] for entry in told["allocated_by_operation"]]
    assert allocated == sorted(allocated, reverse=True)
    assert any(entry["operation"] == "aten::mm" for entry in told["allocated_by_operation"])
    assert told["largest_rise_bytes"] > 4 * 32 * tiny.VOCABULARY, "at least the logits of a row"
    alive = {entry["name"]: entry for entry in told["largest_tensors_alive_at_the_end"]}
    size = tiny.VOCABULARY * 16
    assert alive["model/embed.weight"] == {
        "name": "model/embed.weight", "bytes": 4 * size, "shape": f"{tiny.VOCABULARY}x16", "dtype": "float32"
    }  # fmt: skip
    assert alive["sums/embed.weight"]["bytes"] == 8 * size


def test_a_run_that_ends_within_its_profile_writes_the_whole_steps(config: TrainConfig) -> None:
    config = profiled(config, f"{FIRST}..{LAST + 1}")
    assert train(config, stop_at=LAST) == 0
    run = tiny.only_run(Path(config.runs_dir))
    assert folders(run) == [f"step-{FIRST:06}-{LAST:06}"]
    assert train(config) == 0
    assert folders(run) == [f"step-{FIRST:06}-{LAST:06}", f"step-{LAST + 1:06}-{LAST + 1:06}"]


@pytest.mark.parametrize("what", ["attention", "experts", "block"])
def test_ranges_end_where_parts_are_computed_again(what: Any, config: TrainConfig) -> None:
    config = replace(profiled(config, "1"), recompute=(what,), threads=1)
    assert train(config, stop_at=1) == 0
    (folder,) = (tiny.only_run(Path(config.runs_dir)).path / "profile").iterdir()
    inside = {"attention": "layers.0.attn.wq_a", "experts": "layers.0.ffn.experts", "block": "layers.0.attn_norm"}[what]
    names = ranges(folder)
    assert (names.count("model"), names.count("norm"), names.count(inside)) == (1, 1, 2)


def test_a_large_trace_is_compressed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "LARGE_BYTES", 1)
    config = profiled(config, "1")
    assert train(config, stop_at=1) == 0
    (folder,) = (tiny.only_run(Path(config.runs_dir)).path / "profile").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["memory.json", "table.md", "trace.json.gz"]
    assert json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
