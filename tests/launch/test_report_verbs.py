"""Proves that `keel report` and `keel status` find their run, say what they did, follow a run to its end, and explain
a wrong word in one line."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import status
from launch.main import main
from tests.trainer.report import made_up
from trainer.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs made-1 and made-2, the second with another seed and the newer."""
    made_up.folder(tmp_path / "runs" / "made-1")
    made_up.folder(tmp_path / "runs" / "made-2", config=made_up.config() | {"seed": 9})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_a_report_lies_in_the_runs_folder_and_its_path_is_printed(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "made-1"]) == 0
    assert capsys.readouterr().out == "runs/made-1/report.html\n"
    assert "<title>made-1</title>" in (runs / "made-1" / "report.html").read_text()


def test_a_report_goes_where_it_is_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs/made-2", "--out", "page.html"]) == 0
    assert capsys.readouterr().out == "page.html\n"
    assert (tmp_path / "page.html").is_file()
    assert not (runs / "made-2" / "report.html").exists()


def test_two_runs_are_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "made-1", "made-2"]) == 0
    assert capsys.readouterr().out == "runs/made-1-vs-made-2.html\n"
    assert (
        "<td><code>seed</code></td><td><code>1</code></td><td><code>9</code></td>"
        in (runs / "made-1-vs-made-2.html").read_text()
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report"], "RUN = : expected one run to report on, or two to compare"),
        (["report", "a", "b", "c"], "RUN = a b c: expected one run to report on, or two to compare"),
        (["report", "made-1", "--out", "nowhere/x.html"], "--out = nowhere/x.html: expected a file in a folder"),
        (["report", "mode-1"], "did you mean made-1?"),
        (["status", "a", "b"], "RUN = a b: expected one run's folder or name, or none"),
        (["status", "--folow"], "did you mean --follow?"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("runs")
def test_the_status_of_the_newest_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert capsys.readouterr().out.startswith("made-2  finished  step 80 of 80")
    assert main(["status", "made-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "runs/made-1"


def test_there_may_be_no_run_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2
    assert "runs/ has none yet" in capsys.readouterr().err


def test_a_run_is_followed_to_its_end(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "EVERY_S", 0.01)
    path = runs / "going"
    made_up.folder(path, rows=[made_up.row(1)], history=made_up.history(("start", 0, 0.0)))
    trained = RunFolder(path)
    trained.lock()

    def train() -> None:
        for step in (2, 3):
            time.sleep(0.1)
            with (path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(made_up.row(step)) + "\n")
        time.sleep(0.1)
        trained.end("finished", 3)
        trained.release()

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        assert main(["status", "going", "--follow"]) == 0
    finally:
        trainer.join()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1:3] for line in lines] == [
        ["running", "step 1/80"],
        ["running", "step 2/80"],
        ["running", "step 3/80"],
        ["finished", "step 3/80"],
    ]


def test_ctrl_c_ends_following_and_nothing_else(runs: Path) -> None:
    """As a process of its own: SIGINT to the watcher, whose run goes on being locked by this one."""
    path = runs / "going"
    made_up.folder(path, rows=[made_up.row(1)], history=made_up.history(("start", 0, 0.0)))
    trained = RunFolder(path)
    trained.lock()
    command = [sys.executable, "-m", "launch.main", "status", str(path), "--follow"]
    watcher = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert watcher.stdout is not None
    assert "step 1/80" in watcher.stdout.readline()
    watcher.send_signal(2)
    _, error = watcher.communicate(timeout=30)
    assert (watcher.returncode, error) == (0, "")
    trained.release()
