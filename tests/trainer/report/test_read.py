"""Proves that a run folder is read as it is: its state by its lock, rows once and only when whole, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.report import made_up
from trainer import folder
from trainer.report.read import Folder, is_locked, newest

ROOT = Path(__file__).resolve().parents[3]


def contents(path: Path) -> dict[str, tuple[int, int]]:
    return {str(one): (one.stat().st_mtime_ns, one.stat().st_size) for one in path.rglob("*")}


def test_all_of_a_folder_is_read_and_none_of_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "made-1"
    made = made_up.folder(path)
    before = contents(path)
    run = made.read(made_up.NOW)
    assert contents(path) == before
    assert (run.name, run.state, run.step, run.tokens) == ("made-1", "finished", 80, 80 * made_up.TOKENS)
    assert (run.total_steps, run.total_tokens) == (80, 80 * made_up.TOKENS)
    assert [saved.step for saved in run.checkpoints] == [80], "a folder without COMMIT is no checkpoint"
    assert run.overrides == ["seed=5"]
    assert list(run.samples) == ["step-000080.txt"]
    assert run.below("optim/weight_rms/") == [f"optim/weight_rms/{group}" for group in sorted(made_up.GROUPS)]
    assert run.series("validation/loss")[0][0] == 8 * made_up.TOKENS


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ([], "died"),
        ([("start", 0, 0.0)], "died"),
        ([("start", 0, 0.0), ("end", 80, 9.0, "finished")], "finished"),
        ([("start", 0, 0.0), ("end", 8, 9.0, "SIGTERM")], "stopped"),
        ([("start", 0, 0.0), ("end", 8, 9.0, "stop at step 8")], "stopped"),
        ([("start", 0, 0.0), ("end", 8, 9.0, "FloatingPointError: no number")], "failed"),
        ([("start", 0, 0.0), ("end", 8, 9.0, "SIGTERM"), ("resume", 8, 20.0)], "died"),
    ],
)
def test_the_state_of_a_run_that_nobody_trains(tmp_path: Path, told: Any, state: str) -> None:
    made = made_up.folder(tmp_path / "made", history=made_up.history(*told))
    assert made.read().state == state


def test_a_run_is_running_while_a_process_has_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "made"
    made = made_up.folder(path, history=made_up.history(("start", 0, 0.0)))
    trained = folder.RunFolder(path)
    trained.lock()
    assert made.read().state == "running"
    trained.release()
    assert not is_locked(path)
    assert made.read().state == "died"
    trained.lock()
    trained.release()


def test_rows_that_were_added_are_read_and_half_a_row_is_not(tmp_path: Path) -> None:
    path = tmp_path / "made"
    made = made_up.folder(path, rows=[made_up.row(1)])
    assert made.read().step == 1
    line = json.dumps(made_up.row(2))
    with (path / "metrics.jsonl").open("a") as file:
        file.write(line[:50])
        file.flush()
        assert made.read().step == 1
        file.write(line[50:] + "\n")
    assert [row["step"] for row in made.read().rows] == [1, 2]


def test_a_resume_that_dropped_rows_is_read_afresh(tmp_path: Path) -> None:
    path = tmp_path / "made"
    made = made_up.folder(path, rows=[made_up.row(step) for step in range(1, 9)])
    assert made.read().step == 8
    resumed = folder.RunFolder(path)
    resumed.lock()
    resumed.begin("resume", 4, {})
    resumed.append_metrics(made_up.row(5))
    resumed.release()
    assert [row["step"] for row in made.read().rows] == [1, 2, 3, 4, 5]


def test_numbers_that_are_not_finite_come_back_as_floats(tmp_path: Path) -> None:
    made = made_up.folder(tmp_path / "made", rows=[made_up.row(1) | {"loss/lm": "Infinity"}])
    assert made.read().last("loss/lm") == float("inf")


def test_the_newest_run_is_the_one_whose_files_changed_last(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RUN = : expected .* has none yet"):
        newest(tmp_path)
    for number, name in enumerate(("one", "two", "three")):
        made_up.folder(tmp_path / name)
        for file in ("metrics.jsonl", "history.jsonl", "config.yaml"):
            os.utime(tmp_path / name / file, (1000 - number, 1000 - number))
    os.utime(tmp_path / "two" / "metrics.jsonl", (2000, 2000))
    assert newest(tmp_path).name == "two"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RUN = .*: expected a run folder"):
        Folder(tmp_path)


def test_reading_a_run_imports_neither_torch_nor_hydra() -> None:
    code = "import sys, launch.report, launch.status, trainer.report.compare, trainer.report.terminal; "
    code += "print([name for name in ('torch', 'numpy', 'hydra', 'pydantic') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
