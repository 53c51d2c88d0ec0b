"""Proves that a run observed after every step ends with the bits of one that is never observed, and tells the same."""

import multiprocessing
from pathlib import Path

from tests.runs import tiny
from tests.runs.test_repeat import run_there
from trainer import journal
from trainer.config import ObserveConfig

DEAR = ("mhc/", "experts/", "router/load_LE", "optim/weight_rms/")


def test_observing_changes_no_bit(corpus: Path, tmp_path: Path, processes: multiprocessing.context.BaseContext) -> None:
    runs = [
        run_there(
            processes,
            tiny.config(corpus, tmp_path, observe=ObserveConfig(every_steps=every)),
            tmp_path / f"every-{every}",
        )
        for every in (1, 0)
    ]
    often, never = (tiny.metrics_rows(run) for run in runs)
    assert tiny.different_tensors(*map(tiny.final_tensors, runs)) == []
    assert [{name: value for name, value in row.items() if not name.startswith(DEAR)} for row in often] == never
    groups = {name for name in often[0] if name.startswith("optim/weight_rms/")}
    assert len(groups) > 5
    assert all(sum(name.startswith(DEAR) for name in row) == 6 + len(groups) for row in often)
    assert tiny.samples(runs[0]) == tiny.samples(runs[1])
    for row in journal.read(runs[0].path / "metrics.jsonl"):
        parts = [row[f"time/{part}_s"] for part in ("wait", "forward", "backward", "reduce", "update")]
        assert min(parts) > 0
        assert sum(parts) <= row["time/step_s"], "on one thread they follow each other"
        assert ("speed/product_flops_per_s" in row) == (row["step"] == 1)
        assert (row["time/save_s"] > 0) == (row["step"] in (4, 7)), "the row after a save"
