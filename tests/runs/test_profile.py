"""Proves that a profile sees every row of its steps, names operations and memory, and changes no bit of the run."""

import gzip
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs import tiny
from tests.trainer import steps
from trainer import row
from trainer.config import ProfileConfig, Recomputed
from trainer.debug import dearest, profile
from trainer.folder import RunFolder
from trainer.run import train

FIRST, LAST = 3, 4
"""The steps that are profiled in one piece: a dense one of one row, one of the indexer's warm-up of two rows."""
ROWS = 3 + 1
"""Theirs, and the held-out one that is measured after step 4, before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A run with a profile, and what it printed."""

    run: RunFolder
    said: str


@pytest.fixture(scope="module")
def watched(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The run of `whole` on two threads, stopped within its profile; in what follows, every trace is a large one."""
    config = tiny.config(corpus, tmp_path_factory.mktemp("watched"), threads=2)
    config = replace(config, profile=ProfileConfig(steps=f"{FIRST}..{LAST + 1}"))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "LARGE_BYTES", 1 << 40)
        patch.setattr(dearest, "LARGEST", 1 << 20)
        patch.setattr("trainer.progress.Progress.say", lambda self, text: said.append(text))
        assert train(config, stop_at=LAST) == 0
        patch.setattr(profile, "LARGE_BYTES", 1)
        assert train(config) == 0
    return Watched(run=tiny.only_run(Path(config.runs_dir)), said="\n".join(said))


@pytest.fixture
def folder(watched: Watched) -> Path:
    return watched.run.path / "profile" / f"step-{FIRST:06}-{LAST:06}"


def ranges(trace: bytes) -> list[str]:
    return [event["name"] for event in json.loads(trace)["traceEvents"] if event.get("cat") == "user_annotation"]


def test_no_bit_of_the_run_changes(watched: Watched, whole: RunFolder) -> None:
    tiny.assert_same_run(watched.run, whole)
    assert not (whole.path / "profile").exists()


def test_the_trace_has_every_row_and_module(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["memory.json", "table.md", "trace.json"]
    names = ranges((folder / "trace.json").read_bytes())
    assert names.count("model") == ROWS
    assert names.count("layers.1.attn.wo_b") == ROWS
    assert names.count("mtp.0.ffn.experts") == ROWS


def test_the_table_has_the_dearest_operations_and_is_printed(folder: Path, watched: Watched) -> None:
    text = (folder / "table.md").read_text()
    assert text.strip() in watched.said
    assert text.startswith(f"# steps {FIRST} to {LAST}: ")
    heading, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert heading == ["operation", "shapes of its inputs", "calls", "self time ms", "share"]
    times = [float(row[3]) for row in rows[1:]]
    assert len(times) == 10
    assert times == sorted(times, reverse=True)
    assert 0 < math.fsum(float(row[4].rstrip("%")) for row in rows[1:]) <= 100
    assert any(re.search(r"\d+x\d+", row[1]) for row in rows[1:]), "shapes of matrices"


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


def test_a_run_that_ends_within_its_profile_writes_the_whole_steps_and_goes_on(watched: Watched, folder: Path) -> None:
    """What is left of the profile is one step, whose large trace is compressed."""
    first, second = sorted(folder.parent.iterdir())
    assert (first, second.name) == (folder, f"step-{LAST + 1:06}-{LAST + 1:06}")
    assert (second / "table.md").read_text().startswith(f"# step {LAST + 1}: ")
    assert sorted(path.name for path in second.iterdir()) == ["memory.json", "table.md", "trace.json.gz"]
    assert ranges(gzip.decompress((second / "trace.json.gz").read_bytes())).count("model") == 2


@pytest.mark.parametrize("what", ["attention", "experts", "block"])
def test_ranges_end_where_parts_are_computed_again(what: Recomputed, tmp_path: Path) -> None:
    batch = steps.make_batch(rows=1)
    parts = steps.make_parts(batch, recompute=(what,))
    weights = row.weigh(row.count_rows(batch), mtp=0.3, balance=1e-4, indexer=1.0)
    with profile._recording(parts.pool, cuda=False) as recorded:
        row.learn(parts.model, batch, "sparse", weights)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    inside = {"attention": "layers.0.attn.wq_a", "experts": "layers.0.ffn.experts", "block": "layers.0.attn_norm"}[what]
    names = ranges((tmp_path / "trace.json").read_bytes())
    assert (names.count("model"), names.count("norm"), names.count(inside)) == (1, 1, 2)
