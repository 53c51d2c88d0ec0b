"""Proves that `keel config` shows, compares and copies what is really there."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from launch import compose as composing
from launch.compose import compose
from launch.config import render
from launch.main import main

pytestmark = pytest.mark.usefixtures("merge_once")


def test_show_prints_the_whole_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "model.hc_mult=2"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    expected = json.loads(json.dumps(asdict(compose(["model.hc_mult=2"]).config)))
    assert shown["model"]["hc_mult"] == 2
    assert shown["schedule"] == expected["schedule"]
    assert shown.keys() == expected.keys()


def test_origin_stands_behind_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--origin", "seed=3", "recipe=flash"]) == 0
    origin = {
        line.split(":")[0].strip(): line.rpartition("  # ")[2]
        for line in capsys.readouterr().out.splitlines()
        if "  # " in line
    }
    assert origin["seed"] == "command line"
    assert origin["q_lora_rank"] == "configs/model/flash.yaml"
    assert origin["indexer_warmup_rate"] == "configs/schedule/flash.yaml"
    assert origin["deterministic"] == "default (trainer/config.py)"
    assert origin["std"] == "default (model/config.py)"
    assert origin["split"] == "default (data/config.py)"


def test_json_is_the_same_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(compose([]).config)))
    assert main(["config", "show", "--json", "--origin"]) == 0
    leaf = json.loads(capsys.readouterr().out)["model.vocab_size"]
    assert leaf == {"value": compose([]).config.model.vocab_size, "origin": "configs/model/debug.yaml"}


def test_diff_of_recipes_and_run_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "debug-1234"
    folder.mkdir(parents=True)
    changed = compose(["seed=5", "model.rope_scaling={factor: 4, original_max_position_embeddings: 64}"]).config
    (folder / "config.yaml").write_text("\n".join(render(asdict(changed))))
    monkeypatch.chdir(tmp_path)
    for word in ("debug-1234", "runs/debug-1234", "runs/debug-1234/config.yaml"):
        assert main(["config", "diff", "debug", word]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "seed: 1 -> 5" in lines
        assert "model.rope_scaling.factor: (absent) -> 4.0" in lines
        assert all(line.startswith(("seed:", "model.rope_scaling")) for line in lines)
    assert main(["config", "diff", "debug", "debug"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["config", "diff", "--json", "debug", "flash"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == ["debug", "flash"]


def test_a_copied_recipe_can_be_used_and_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "debug.yaml").write_text("# @package _global_\nname: debug\nseed: 4\n")
    monkeypatch.setattr(composing, "CONFIGS", tmp_path)
    monkeypatch.setattr(composing, "choices", lambda group: sorted(path.stem for path in recipe.iterdir()))
    assert main(["config", "cp", "debug", "mine"]) == 0
    assert (recipe / "mine.yaml").read_text() == "# @package _global_\nname: mine\nseed: 4\n"
    for words, said in (
        (["debug", "mine"], "NEW = mine: expected a name"),
        (["debug", "../x"], "NEW = ../x: expected a name"),
        (["nothing", "other"], "RECIPE = nothing: expected one of debug, mine"),
        (["debug"], "keel config cp = debug: expected a recipe and a new name"),
    ):
        capsys.readouterr()
        assert main(["config", "cp", *words]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in recipe.iterdir()) == ["debug.yaml", "mine.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "keel config = : expected one of show, diff, cp"),
        (["shwo"], "keel config = shwo: expected one of show, diff, cp"),
        (["diff", "debug"], "expected two recipes, run folders or config.yaml files"),
        (["diff", "debug", "nowhere"], "RUN = nowhere: expected the folder of a run"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
