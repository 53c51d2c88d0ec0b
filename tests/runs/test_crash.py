"""Proves that a run whose numbers are none any more names the place, leaves a folder that replays, and goes on."""

import json
import math
import multiprocessing
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.main import main
from tests.runs import children, tiny
from tests.runs.planting import STEP, WARM_UP_STEP, crash_of, crashed, plant_before
from trainer import checkpoint, durable, loop, row
from trainer.build import read_data
from trainer.config import TrainConfig
from trainer.debug.crash import CONFIG, REPORT, load
from trainer.folder import RunFolder
from trainer.manifest import data_file
from trainer.run import train

DATA = data_file(0)
TOKEN, SEED = 268, 2
"""The first row of this seed holds two documents, and only the second has this token."""


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> TrainConfig:
    return tiny.config(corpus, tmp_path / "runs")


def bad_weight(model: Any) -> None:
    model.layers[1].attn.wo_b.weight[3, 2] = math.inf


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bad_weight_is_named_and_replays_in_a_process_of_its_own(
    threads: int,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    processes: multiprocessing.context.BaseContext,
    tmp_path: Path,
) -> None:
    plant_before(monkeypatch, STEP, bad_weight)
    run, said = crashed(replace(config, threads=threads), capfd)
    line, folder, resume = said
    place = (
        r"keel: error: step 7, row 1 of 3 \(row 10 of the run, from text\): loss/lm: expected finite values, found nan"
    )
    finding = r"first not finite: layer 1, weight layers\.1\.attn\.wo_b\.weight: inf at \[3, 2\] of \[16, 16\] .*"
    document = r"in document 0 \(positions 0 to \d+; number \d+ of chunk 0 in epoch 0 of text\): '\d+ [a-h ]+'.*"
    assert re.fullmatch(f"{place}; {finding}; {document}", line)
    crash = crash_of(run)
    size = sum(file.stat().st_size for file in crash.iterdir()) / 1e6
    assert folder == f"crash folder: {crash} ({size:.1f} MB); to compute that row again: ./keel train --replay {crash}"
    assert resume == f"the last checkpoint is kept; to go on from it: ./keel resume {run.path}"
    assert run.history()[-1]["step"] == STEP - 1
    assert (crash / "report.md").read_text().startswith(line.removeprefix("keel: error: "))

    words, out, err = ["train", "--replay", str(crash)], tmp_path / "out", tmp_path / "err"
    child = processes.Process(target=children.command, args=(words, out, err))
    child.start()
    child.join()
    assert (child.exitcode, err.read_text()) == (0, "")
    assert "\nreproduced: the same tensor is the first that is not finite\n" in out.read_text()
    table = [line for line in (crash / "report.md").read_text().splitlines() if line.startswith("|")]
    assert [line for line in out.read_text().splitlines() if line.startswith("|")] == table


def test_the_documents_that_hold_a_bad_token_are_named_and_no_others(
    config: TrainConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def spoil(model: Any) -> None:
        model.embed.weight[TOKEN] = math.inf

    plant_before(monkeypatch, 1, spoil)
    _, (line, *_) = crashed(replace(config, seed=SEED), capfd)
    assert f"first not finite: weight embed.weight: inf at [{TOKEN}, 0]" in line
    assert "in document 1 (positions 21 to 30; " in line
    (path,) = (tiny.only_run(Path(config.runs_dir)).path / "crashes").iterdir()
    crash = load(path)
    row = crash.fault.row
    having = {int(piece) for piece in row.document_BT[row.token_BT == TOKEN]}
    assert 0 < len(having) < len(crash.documents), "a row in which some documents have the token and others do not"
    named = [line for line in (path / "report.md").read_text().splitlines() if line.startswith("- document ")]
    assert named == [f"- {document}" for document in crash.documents if document.piece in having]
    texts = [file.read_text() for file in corpus.iterdir()]
    for document in crash.documents:
        assert set(row.document_BT[0, document.first : document.last + 1].tolist()) == {document.piece}
        if document.start == 0:
            words = document.text.removesuffix("...")
            assert any(text.startswith(words) for text in texts)


def test_a_fault_that_does_not_repeat_says_so_and_the_run_goes_on_to_the_same_end(
    config: TrainConfig, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    learn, calls = row.learn, 0

    def learn_once_badly(*arguments: Any) -> row.RowSums:
        nonlocal calls
        calls += 1
        sums = learn(*arguments)
        return replace(sums, mtp=math.nan) if calls == 8 else sums

    monkeypatch.setattr(row, "learn", learn_once_badly)
    run, (line, *_) = crashed(config, capfd)
    assert "loss/mtp: expected finite values, found nan; every tensor of the row is finite when it is comp" in line
    assert "step 7, row 2 of 3 (row 11 of the run, from text): " in line
    (crash,) = (run.path / "crashes").iterdir()
    origin = read_data(config, lambda text: None).train.origin(0, 11)
    assert [document.number for document in load(crash).documents] == origin.documents.tolist()
    assert main(["train", "--replay", str(crash)]) == 0
    assert "finite now: the fault does not repeat here" in capfd.readouterr().out
    assert train(config) == 0
    tiny.assert_same_run(tiny.only_run(Path(config.runs_dir)), whole)


def test_without_a_fault_nothing_is_left(whole: RunFolder) -> None:
    assert not (whole.path / "crashes").exists()


@pytest.mark.parametrize("step", [2, WARM_UP_STEP])
def test_the_dense_and_the_warm_up_stage_replay(
    step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the warm-up only indexers have gradients, and one of them is spoiled."""

    def spoil(model: Any) -> None:
        weight = model.layers[0].attn.indexer.wq_b.weight if step == WARM_UP_STEP else model.mtp[0].e_proj.weight
        weight[0, 0] = math.nan

    plant_before(monkeypatch, step, spoil)
    run, (line, *_) = crashed(config, capfd)
    name = (
        "layer 0, weight layers.0.attn.indexer.wq_b.weight: nan"
        if step == WARM_UP_STEP
        else "MTP block, weight mtp.0.e_proj."
    )
    assert name in line
    assert main(["train", "--replay", str(crash_of(run, step)), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["reproduced"]
    assert told["first"] == json.loads((crash_of(run, step) / "trace.json").read_text())["first"]


def test_another_first_tensor_is_told_apart(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plant_before(monkeypatch, STEP, bad_weight)
    run, _ = crashed(config, capfd)
    told = json.loads((crash_of(run) / "trace.json").read_text())
    (crash_of(run) / "trace.json").write_text(json.dumps(told | {"first": "output of embed"}))
    assert main(["train", "--replay", str(crash_of(run))]) == 1
    assert "first in another tensor: weight layers.1.attn.wo_b.weight, not output of embed" in capfd.readouterr().out


def test_a_step_that_fails_again_replaces_its_crash_folder(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plant_before(monkeypatch, STEP, bad_weight)
    run, said = crashed(config, capfd)
    before = (crash_of(run) / "manifest.json").read_bytes()
    assert crashed(config, capfd)[1] == said
    assert [path.name for path in (run.path / "crashes").iterdir()] == [crash_of(run).name]
    assert (crash_of(run) / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("file", [DATA, CONFIG, REPORT])
def test_a_full_disk_leaves_the_message(
    file: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plant_before(monkeypatch, STEP, bad_weight)
    write = durable.write

    def save(*arguments: Any) -> None:
        raise checkpoint.CheckpointError("no space left")

    def full(path: Path, content: bytes) -> None:
        if path.parent.parent.name == "crashes" and path.name == file:
            raise OSError("no space left")
        write(path, content)

    if file == DATA:
        monkeypatch.setattr("trainer.debug.crash.checkpoint.save", save)
        monkeypatch.setattr(loop, "save", lambda *arguments: None)
    monkeypatch.setattr(durable, "write", full)
    run, (line, folder, _) = crashed(config, capfd)
    assert "weight layers.1.attn.wo_b.weight: inf" in line
    assert run.history()[-1]["event"] == "end"
    assert folder == "the crash folder could not be written: no space left"


def test_what_cannot_be_replayed_is_one_line(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plant_before(monkeypatch, STEP, bad_weight)
    run, _ = crashed(config, capfd)
    crash, damaged = crash_of(run), crash_of(run).with_name("step-000007-damaged")
    shutil.copytree(crash, damaged)
    os.truncate(damaged / DATA, 1000)
    refused = {
        f"--replay {run.path}": "expected a crash folder, such as RUN/crashes/step-000123",
        f"--replay {run.path}/nothing": "expected a crash folder, such as RUN/crashes/step-000123",
        f"--replay {damaged}": "expected a crash folder that verifies",
        f"--replay {crash} model.moe_intermediate_size=8": "expected the sizes of the crash",
        f"--replay {crash} model.num_hidden_layers=1": "expected",
        f"--replay {crash} precision.dtype=fp31": "expected one of",
        f"--replay {crash} --new": "expected no --replay beside it",
    }
    for words, told in refused.items():
        assert main(["train", *words.split()]) == 2, words
        error = capfd.readouterr().err
        assert error.startswith("keel: error: ")
        assert error.count("\n") == 1
        assert told in error
