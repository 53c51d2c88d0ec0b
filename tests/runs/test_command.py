"""Proves what the commands promise: `keel train` goes on, starts anew or refuses; `resume`, `sample`; a run's files."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch.compose import compose, read
from tests.runs import children, tiny
from trainer import checkpoint, journal, metrics
from trainer.config import TrainConfig
from trainer.folder import RunFolder
from trainer.run import train

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"keel: error: \S+ = .*: expected .*\n")
PATIENCE_S = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A command that has ended."""

    code: int | None
    out: str
    err: str


Keel = Callable[..., Ended]


@pytest.fixture
def keel(processes: multiprocessing.context.BaseContext, tmp_path: Path) -> Keel:
    """Run `keel WORDS...` in a process of its own."""
    number = 0

    def run(*words: str) -> Ended:
        nonlocal number
        number += 1
        out, err = tmp_path / f"{number}.out", tmp_path / f"{number}.err"
        child = processes.Process(target=children.command, args=(list(words), out, err))
        child.start()
        child.join()
        return Ended(code=child.exitcode, out=out.read_text(), err=err.read_text())

    return run


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> TrainConfig:
    return tiny.config(corpus, tmp_path / "runs")


def names(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in Path(config.runs_dir).iterdir())


def test_the_words_compose_the_tiny_run(config: TrainConfig) -> None:
    assert compose(tiny.words(config)).config == config


def test_the_same_command_goes_on_and_a_finished_run_is_left_alone(
    config: TrainConfig, keel: Keel, whole: RunFolder
) -> None:
    """The first process is a real one of the interpreter's, ended by SIGTERM as soon as it has told of two steps."""
    words = ["train", *tiny.words(config)]
    code = "import sys; from launch.main import main; sys.exit(main())"
    first = subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for_rows(config, 2)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=PATIENCE_S)
    run = tiny.only_run(Path(config.runs_dir))
    assert first.returncode == 143
    assert f"To go on: ./keel resume {run.path}\n" in out

    second = keel(*words)
    assert (second.code, second.err) == (0, "")
    assert second.out.startswith(f"continuing {run.path}: the same configuration, not finished (--new starts afresh)\n")
    assert f"another sample:  ./keel sample {run.path}\n" in second.out
    tiny.assert_same_run(run, whole)

    third = keel(*words)
    assert third.code == 0
    assert "continuing" not in third.out
    assert names(config) == [run.path.name, f"{run.path.name}-2"]
    tiny.assert_same_run(RunFolder(run.path.with_name(f"{run.path.name}-2")), whole)
    assert [row["event"] for row in run.history()] == ["start", "end", "resume", "end"]


def test_new_starts_another_beside_an_unfinished_one(config: TrainConfig, keel: Keel, whole: RunFolder) -> None:
    train(config, stop_at=2)
    unfinished = tiny.only_run(Path(config.runs_dir))
    before = tiny.metrics_rows(unfinished)
    assert keel("train", "--new", *tiny.words(config)).code == 0
    assert names(config) == [unfinished.path.name, f"{unfinished.path.name}-2"]
    assert tiny.metrics_rows(unfinished) == before
    tiny.assert_same_run(RunFolder(unfinished.path.with_name(f"{unfinished.path.name}-2")), whole)


def test_another_configuration_is_another_run(config: TrainConfig, keel: Keel) -> None:
    train(config, stop_at=2)
    assert keel("train", *tiny.words(replace(config, seed=2))).code == 0
    assert len(names(config)) == 2


def test_two_processes_cannot_train_one_run(
    processes: multiprocessing.context.BaseContext, config: TrainConfig, keel: Keel, tmp_path: Path
) -> None:
    words = ["train", *tiny.words(config)]
    log = tmp_path / "first.log"
    first = processes.Process(target=children.command_with_a_slow_row, args=(words, log, 1))
    first.start()
    try:
        wait_for_rows(config, 1)
        run = tiny.only_run(Path(config.runs_dir))
        for command in (words, ["resume", str(run.path)]):
            ended = keel(*command)
            assert ended.code == 2
            assert ended.err == (
                f"keel: error: run = {run.path}: expected a run that no other process is training "
                f"(process {first.pid} is)\n"
            )
        assert [row["event"] for row in run.history()] == ["start"]
        assert len(names(config)) == 1
    finally:
        first.kill()
        first.join()


@pytest.mark.parametrize(
    "mistake",
    [
        "model.hiden_size=16",
        "model.num_experts_per_tok=5",
        "data.sources.text.path=/nowhere",
        "+optim.rate_scale.indexr=2",
        "optim.freeze=[indexr]",
        "name=..",
        pytest.param("device=cuda", marks=pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="has a GPU")),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_created(config: TrainConfig, keel: Keel, mistake: str) -> None:
    ended = keel("train", *tiny.words(config), mistake)
    assert ended.code == 2
    assert LINE.fullmatch(ended.err), ended.err
    assert not list(Path(config.runs_dir).glob("*")), "something was created"


def test_what_a_run_leaves(config: TrainConfig, keel: Keel) -> None:
    words = tiny.words(config)
    ended = keel("train", "--json", *words)
    assert ended.code == 0
    run = tiny.only_run(Path(config.runs_dir))
    rows = journal.read(run.path / "metrics.jsonl")
    assert [json.loads(line) for line in ended.out.splitlines()] == rows
    used = {name for row in rows for name in row}
    assert all(metrics.is_known(name) for name in used)
    assert set(metrics.METRICS) <= used, "a metric of the table that no run writes"
    assert read(run.path / "config.yaml") == config
    assert (run.path / "overrides.txt").read_text().splitlines() == words
    start, end = run.history()
    assert (start["event"], start["step"]) == ("start", 0)
    assert (end["event"], end["step"], end["reason"]) == ("end", tiny.STEPS, "finished")
    assert list(checkpoint.steps(run.checkpoints)) == [3, 6, 9]
    assert list(tiny.samples(run)) == [f"step-{tiny.STEPS:06}.txt"]


def test_resume_finishes_a_run_and_refuses_another_run(config: TrainConfig, keel: Keel, whole: RunFolder) -> None:
    train(config, stop_at=4)
    run = tiny.only_run(Path(config.runs_dir))
    refused = keel("resume", str(run.path), "seed=2")
    assert (refused.code, bool(LINE.fullmatch(refused.err))) == (2, True)
    ended = keel("resume", str(run.path))
    assert (ended.code, ended.err) == (0, "")
    assert f"run {run.path}: going on after step 4 of {tiny.STEPS}\n" in ended.out
    tiny.assert_same_run(run, whole)
    again = keel("resume", str(run.path))
    assert again.code == 2
    assert again.err == f"keel: error: run = {run.path}: expected an unfinished run, this one is finished\n"


def test_sample_writes_what_the_end_of_the_run_wrote(keel: Keel, whole: RunFolder) -> None:
    before = sorted(path.stat().st_mtime_ns for path in whole.path.rglob("*"))
    (text,) = tiny.samples(whole).values()
    ended = keel("sample", str(whole.path))
    assert (ended.code, ended.out, ended.err) == (0, f"{text}\n", "")
    words = ["--json", "--seed", "5", "--tokens", "20", "--prompt", "7 ", "--prompt", "a b c"]
    other = keel("sample", str(whole.path), *words)
    assert other.code == 0
    found = json.loads(other.out)
    assert (found["step"], found["seed"], found["tokens"], found["prompts"]) == (tiny.STEPS, 5, 20, ["7 ", "a b c"])
    assert all(map(str.startswith, found["texts"], found["prompts"]))
    assert sorted(path.stat().st_mtime_ns for path in whole.path.rglob("*")) == before, "sampling changed the run"


def test_sample_takes_any_checkpoint(keel: Keel, whole: RunFolder) -> None:
    found = json.loads(keel("sample", str(whole.path), "--json", "--step", "3").out)
    assert found["step"] == 3
    ended = keel("sample", str(whole.path), "--step", "4")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "keel: error: --step = 4: expected one of 3, 6, 9\n"
    ended = keel("sample", str(whole.path), "--tokens", "300")
    assert (ended.code, ended.out) == (2, "")
    assert "tokens" in ended.err
    assert LINE.fullmatch(ended.err), ended.err


def test_a_damaged_checkpoint_is_refused_by_step_and_passed_over_without(config: TrainConfig, keel: Keel) -> None:
    train(config)
    run = tiny.only_run(Path(config.runs_dir))
    (run.checkpoints / "step-000009" / "manifest.json").write_text("{}")
    ended = keel("sample", str(run.path), "--step", "9")
    assert (ended.code, ended.out) == (2, "")
    assert LINE.fullmatch(ended.err), ended.err
    assert json.loads(keel("sample", str(run.path), "--json").out)["step"] == 6


def test_a_sample_that_does_not_fit_into_a_row_is_refused_before_the_run(config: TrainConfig, keel: Keel) -> None:
    ended = keel("train", *tiny.words(config), "sample.prompt=abc", "sample.tokens=253")
    assert (ended.code, list(Path(config.runs_dir).glob("*"))) == (2, [])
    assert ended.err.startswith("keel: error: sample.tokens = 253: expected at most 252")


def test_sample_says_when_there_is_nothing_to_sample(config: TrainConfig, keel: Keel) -> None:
    train(config, stop_at=0)
    ended = keel("sample", str(tiny.only_run(Path(config.runs_dir)).path))
    assert (ended.code, ended.out) == (2, "")
    assert LINE.fullmatch(ended.err), ended.err


def wait_for_rows(config: TrainConfig, rows: int) -> None:
    """Return when the only run has told of so many steps."""
    deadline = time.monotonic() + PATIENCE_S
    while sum(len(file.read_bytes().splitlines()) for file in Path(config.runs_dir).glob("[!.]*/metrics.jsonl")) < rows:
        assert time.monotonic() < deadline, "the command makes no progress"
        time.sleep(0.01)
