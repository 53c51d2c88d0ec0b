"""Proves the run folder: found again by its configuration only, locked, free of secrets, metrics as of one run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given, settings

from trainer import folder, journal
from trainer.folder import FINISHED, RunFolder, create, find_unfinished, identity
from trainer.provenance import Commit, facts

CONFIG: dict[str, Any] = {"name": "debug", "seed": 1, "rate": 1e-06, "ratios": (0, 4), "data": {"path": "ä", "x": None}}
CLEAN = Commit(commit="a" * 40, dirty=False, patch="")


HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
print(os.getpid(), file=file, flush=True)
print("held", flush=True)
time.sleep(60)
"""


def make(runs: Path, **changes: Any) -> RunFolder:
    return create(runs, "debug", {**CONFIG, **changes}, ["seed=1"], {"torch": "2"}, CLEAN)


# the folder and its name


def test_a_new_folder_has_everything_in_it(tmp_path: Path) -> None:
    run = create(tmp_path, "debug", CONFIG, ["seed=1", "a=b"], facts(device="cpu", dtype="bf16"), CLEAN)
    assert re.fullmatch(r"debug-[0-9a-f]{4}", run.path.name)
    files = {"config.yaml", "overrides.txt", "provenance.json", "dirty.patch", "history.jsonl", "metrics.jsonl", "lock"}
    folders = {"checkpoints", "samples", "logs", "ranks", "wandb"}
    assert {path.name for path in run.path.iterdir()} == files | folders
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {**CONFIG, "ratios": [0, 4]}
    assert (run.path / "overrides.txt").read_text() == "seed=1\na=b\n"
    assert [path.name for path in tmp_path.iterdir()] == [run.path.name]
    assert run.run_id.startswith(f"{run.path.name}-")
    assert RunFolder(run.path).run_id == run.run_id
    assert run.provenance["commit"] == "a" * 40
    assert run.config_identity == identity(CONFIG)


def test_another_run_of_the_same_configuration_gets_a_number_and_an_id(tmp_path: Path) -> None:
    runs = [make(tmp_path) for _ in range(3)]
    first = runs[0].path.name
    assert [run.path.name for run in runs] == [first, f"{first}-2", f"{first}-3"]
    assert len({run.run_id for run in runs}) == 3


@settings(max_examples=50)
@given(seed=st.integers(), rate=st.floats(allow_nan=False, allow_infinity=False), path=st.text())
def test_identity_is_equal_exactly_for_equal_configurations(seed: int, rate: float, path: str) -> None:
    config = {"seed": seed, "data": {"rate": rate, "path": path}}
    assert identity(config) == identity({"data": {"path": path, "rate": rate}, "seed": seed})
    assert identity(config) != identity({**config, "seed": seed + 1})
    assert identity(config) != identity({"seed": seed, "data": {"rate": rate, "path": path + " "}})


def test_a_killed_creation_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.durable, "write", refuse)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "a\n", "x" * 81])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name = "):
        create(tmp_path, name, CONFIG, [], {}, CLEAN)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run = .*: expected a run folder"):
        RunFolder(tmp_path)


# going on with an unfinished run


def test_only_an_unfinished_run_of_the_same_configuration_is_found(tmp_path: Path) -> None:
    wanted = identity(CONFIG)
    assert find_unfinished(tmp_path / "runs", "debug", wanted) is None
    run = make(tmp_path)
    make(tmp_path, seed=2)
    create(tmp_path, "debug2", CONFIG, [], {}, CLEAN)
    found = find_unfinished(tmp_path, "debug", wanted)
    assert found is not None
    assert found.path == run.path
    assert find_unfinished(tmp_path, "debug", identity({**CONFIG, "seed": 3})) is None
    run.begin("start", 0, {})
    run.end("SIGTERM", 3)
    run.begin("resume", 3, {})
    assert find_unfinished(tmp_path, "debug", wanted) is not None
    run.end(FINISHED, 10)
    assert find_unfinished(tmp_path, "debug", wanted) is None


def test_a_colliding_short_identity_is_not_the_same_configuration(tmp_path: Path) -> None:
    run = make(tmp_path)
    other = run.config_identity[:4] + "0" * 60
    assert find_unfinished(tmp_path, "debug", other) is None


def test_the_latest_of_several_unfinished_runs_is_found(tmp_path: Path) -> None:
    runs = [make(tmp_path) for _ in range(11)]
    found = find_unfinished(tmp_path, "debug", identity(CONFIG))
    assert found is not None
    assert found.path == runs[-1].path
    runs[-1].begin("start", 0, {})
    runs[-1].end(FINISHED, 1)
    found = find_unfinished(tmp_path, "debug", identity(CONFIG))
    assert found is not None
    assert found.path == runs[-2].path


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    run = make(tmp_path)
    with pytest.raises(ValueError, match=rf"expected a run that no other process is training \(process {os.getpid()}"):
        RunFolder(run.path).lock()
    run.release()
    with subprocess.Popen([sys.executable, "-c", HOLDER, run.path / "lock"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"process {child.pid} is") as refusal:
            run.lock()
        assert "\n" not in str(refusal.value)
        child.kill()
        child.wait()
        run.lock()
    run.release()
    run.release()


# history and metrics


def test_keys_that_differ_are_told_without_their_secrets(tmp_path: Path) -> None:
    config = {"seed": 1, "rate": {"peak": 0.5}, "lists": (1, [2]), "gone": None, "hub_token": "PLANTED"}
    run = create(tmp_path, "debug", config, [], {}, CLEAN)
    assert run.changed_keys({**config, "lists": [1, [2]], "hub_token": "OTHER"}) == []
    other = {"seed": 1, "rate": {"peak": 0.25}, "lists": (1, [3]), "path": "s3://u:PLANTED@h/x", "hub_token": "PLANTED"}
    assert run.changed_keys(other) == [
        "rate.peak was 0.5, is 0.25",
        "lists was [1, [2]], is [1, [3]]",
        "gone was null, is absent",
        "path was absent, is s3://[redacted]@h/x",
    ]
    run.begin("resume", 3, {}, run.changed_keys(other))
    assert RunFolder(run.path).history()[-1]["changes"] == run.changed_keys(other)


def test_history_tells_starts_and_ends(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.begin("start", 0, {"facts": {"torch": "2"}})
    run.end("SIGTERM https://u:PLANTED@h/x", 5)
    run.release()
    rows = RunFolder(run.path).history()
    assert [(row["event"], row["step"]) for row in rows] == [("start", 0), ("end", 5)]
    assert rows[0]["facts"] == {"torch": "2"}
    assert rows[1]["reason"] == "SIGTERM https://[redacted]@h/x"
    assert all(row["time"].endswith("+00:00") for row in rows)


def rows_of(run: RunFolder) -> list[Any]:
    return [row["step"] for row in journal.read(run.path / "metrics.jsonl")]


def test_metrics_after_the_resumed_step_are_dropped_so_that_the_file_reads_as_one_run(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.begin("start", 0, {})
    for step in (0, 1, 2, 2, 3, 4):
        run.append_metrics({"step": step, "loss": 1 / (step + 7)})
    run.sync_metrics()
    before = (run.path / "metrics.jsonl").read_bytes()
    run.release()
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo')
    run = RunFolder(run.path)
    run.lock()
    run.begin("resume", 2, {})
    assert rows_of(run) == [0, 1, 2, 2]
    assert [row["steps_again"] for row in run.history()] == [0, 2], "whole rows only"
    for step in (3, 4):
        run.append_metrics({"step": step, "loss": 1 / (step + 7)})
    assert (run.path / "metrics.jsonl").read_bytes() == before
    run.release()
    run.begin("start", 0, {})
    assert rows_of(run) == []


def test_rows_survive_without_sync_and_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.begin("start", 0, {})
    run.append_metrics({"step": 1, "loss": float("nan"), "list": [float("inf"), {"x": float("-inf")}]})
    line = (run.path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": "NaN", "list": ["Infinity", {"x": "-Infinity"}]}
    assert str(float(row["loss"])) == "nan"


@pytest.mark.parametrize("torn", [b"", b'{"step"', b"\0" * 70_000, b"x" * 65_536])
def test_a_torn_last_line_is_dropped_when_the_file_is_opened(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "x.jsonl"
    for whole in (b"", b'{"a": 1}\n{"a": 2}\n', b'{"a": "' + b"y" * 200_000 + b'"}\n'):
        path.write_bytes(whole + torn)
        assert journal.read(path) == [json.loads(line) for line in whole.splitlines()]
        log = journal.Journal(path)
        log.append({"a": 3})
        log.close()
        assert path.read_bytes() == whole + b'{"a": 3}\n'


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 = b'broken"):
        journal.keep(path, lambda row: True)
    assert path.read_bytes().startswith(b'{"step": 1}\nbroken')


# secrets


def test_no_secret_reaches_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "PLANTED")
    monkeypatch.setenv("PLANTED_NAME", "x")
    monkeypatch.setattr("sys.argv", ["keel", "train", "--token=PLANTED"])
    config = {
        "data": {"path": "s3://key:PLANTED@bucket/x", "url": "https://h/x?token=PLANTED", "hub_token": "PLANTED"},
        "list": ["hf_PLANTEDPLANTEDPLANTED"],
    }
    overrides = ["+data.hub_token=PLANTED", "data={path: 's3://key:PLANTED@bucket/x', password: PLANTED}"]
    run = create(tmp_path, "debug", config, overrides, facts(device="cpu", dtype="bf16"), CLEAN)
    run.begin("start", 0, {})
    run.end("failed: https://u:PLANTED@host", 1)
    run.release()
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert [path for path in files if b"PLANTED" in path.read_bytes()] == []
