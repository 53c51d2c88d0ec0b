"""Proves that `keel import` and `keel export` tell on standard output what they did, and how far they are elsewhere."""

import json
from pathlib import Path

import pytest

from launch.main import main
from tests.trainer import released_folder as made
from trainer.released import job


def test_reports_are_lines_of_json_and_progress_is_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "LINE_S", 0.0)
    keys = made.config()
    made.write(tmp_path / "released", keys, made.tensors(keys))
    names = set(made.numbers(made.tensors(keys)))
    for words, out in ((["import", "released", "import"], "import"), (["export", "import", "back"], "back")):
        assert main([*words, "--json"]) == 0
        said = capsys.readouterr()
        *rows, last = map(json.loads, said.out.splitlines())
        assert rows == [json.loads(line) for line in (tmp_path / out / "report.jsonl").read_text().splitlines()]
        assert {row["name"] for row in rows} == names
        assert last["summary"]["tensors"] == len(rows)
        assert last["summary"]["bytes"] == sum(row["bytes"] for row in rows)
        assert "left 0:0" in said.err.splitlines()[-1]


def test_a_summary_is_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = made.config()
    made.write(tmp_path / "released", keys, made.tensors(keys))
    assert main(["import", "released", "import"]) == 0
    assert "parameters          1,405,780\n" in capsys.readouterr().out
    assert main(["export", "import", "out", "--format", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["exported", "out"], ["format", "bf16"]]
    assert "scales kept" not in "".join(lines)
