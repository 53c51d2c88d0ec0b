"""Proves that configurations compose: overrides of any key, strict but fair types, and an origin for every value."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.compose import COMMAND_LINE, CONFIGS, choices, compose, read, validate
from launch.config import render
from trainer.leaves import flatten

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("merge_once")
@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["seed=7"], "seed", 7),
        (["model.hc_sinkhorn_iters=5"], "model.hc_sinkhorn_iters", 5),
        (["loss.balance_weight=0"], "loss.balance_weight", 0),
        (["sample.prompt='a = b, c'"], "sample.prompt", "a = b, c"),
        (["sample.prompt="], "sample.prompt", ""),
        (["+data.sources.x.kind=text", "data.sources.x.path=here"], "data.sources.x.path", "here"),
        (["data.sources.stdlib.path=here"], "data.sources.stdlib.path", "here"),
        (["+optim.rate_scale.indexer=0.5"], "optim.rate_scale.indexer", 0.5),
        (["optim.freeze=[head]"], "optim.freeze", ("head",)),
        (["schedule.row_length.0.value=256"], "schedule.row_length", ({"from_tokens": 0, "value": 256},)),
        (["model.num_hidden_layers=2", "model.compress_ratios=[4,16,0]"], "model.compress_ratios", (4, 16, 0)),
        (["model.rope_scaling={factor: 4, original_max_position_embeddings: 64}"], "model.rope_scaling.factor", 4),
        (["tracking.wandb=off"], "tracking.wandb", "off"),
        (["tracking=off"], "tracking.wandb", "off"),
        (["~tracking"], "tracking.wandb", "auto"),
        (["~model.hc_mult"], "model.hc_mult", 4),
        (["precision=bf16"], "precision.dtype", "bf16"),
        (["model=small", "model.hidden_size=256"], "model.hidden_size", 256),
        (["model.hidden_size=256", "model=small"], "model.hidden_size", 256),
        (["recipe=flash", "model=debug", "schedule=debug", "model.vocab_size=200000"], "model.rope_scaling", None),
        (["seed=${model.hidden_size}", "model.hidden_size=96"], "seed", 96),
        (["seed=1", "seed=2"], "seed", 2),
    ],
)
def test_any_key_can_be_overridden(overrides: list[str], key: str, value: object) -> None:
    assert flatten(asdict(compose(overrides).config))[key] == value


def test_integers_serve_as_numbers_and_nothing_else_is_converted() -> None:
    assert compose(["schedule.rate.peak=1"]).config.schedule.rate.peak == 1
    with pytest.raises(ValueError, match="seed = 1: expected an integer"):
        compose(["seed='1'"])


def test_every_value_tells_where_it_came_from() -> None:
    origin = compose(
        [
            "recipe=flash",
            "precision=fp32",
            "model.hc_mult=4",
            "schedule.row_length.0.value=2048",
            "optim={clip_norm: 2}",
        ]
    ).origin
    assert origin["seed"] == "configs/train.yaml"
    assert origin["model.vocab_size"] == "configs/model/flash.yaml"
    assert origin["model.rope_scaling.factor"] == "configs/model/flash.yaml"
    assert origin["precision.dtype"] == "configs/precision/fp32.yaml"
    assert origin["data.tokenizer.kind"] == "configs/recipe/flash.yaml"
    assert origin["data.tokenizer.vocab_size"] == "configs/data/stdlib.yaml"
    assert origin["model.hc_mult"] == COMMAND_LINE
    assert origin["schedule.row_length"] == COMMAND_LINE
    assert origin["optim.clip_norm"] == COMMAND_LINE
    assert origin["optim.muon.momentum"] == "configs/optim/v4.yaml"
    assert "deterministic" not in origin


def test_origins_cover_what_the_files_spell_and_no_more() -> None:
    composition = compose([])
    leaves = flatten(asdict(composition.config))
    assert set(composition.origin) <= set(leaves)
    assert all((ROOT / file).is_file() for file in composition.origin.values())


def test_what_is_shown_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    config = compose(["recipe=flash", "+optim.rate_scale.indexer=0.5", "sample.prompt='x: \"y\" # z\\n'"]).config
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(render(asdict(config))), encoding="utf-8")
    assert read(path) == config
    assert read(path, ["seed=5", "device=cpu"]).seed == 5
    with pytest.raises(ValueError, match="seed = x: expected an integer"):
        read(path, ["seed=x"])


def test_another_recipe_stands_in_place_of_the_file_s(tmp_path: Path) -> None:
    """Nothing of the run's own is left, other keys are as they were; a recipe that is none is named."""
    words = ["recipe=pro", "precision=fp8_fp4", "precision.entries.format=e4m3_1x64"]
    path, config = tmp_path / "config.yaml", compose(words).config
    path.write_text("\n".join(render(asdict(config))), encoding="utf-8")
    for name in ("bf16", "fp8"):
        assert read(path, [f"precision={name}"]) == replace(
            config, precision=compose([f"precision={name}"]).config.precision
        )
    assert read(path, ["precision=fp8", "precision.floor_e4m3=0"]).precision.floor_e4m3 == 0
    with pytest.raises(ValueError, match="precision = fp9: expected one of bf16, fp32, fp8, fp8_fp4"):
        read(path, ["precision=fp9"])


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected a YAML mapping"):
        read(tmp_path / "config.yaml")


def test_validate_does_not_mark_the_classes() -> None:
    values = asdict(compose([]).config)
    assert asdict(validate(values)) == values
    assert not hasattr(type(validate(values)), "__pydantic_config__")


def test_composing_leaves_no_trace_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose([])
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


def test_checking_a_configuration_imports_neither_torch_nor_numpy() -> None:
    code = "import sys; from launch.compose import compose; compose(['recipe=pro']); print([*sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"'torch'", "'numpy'", "'datasets'", "'wandb'"} & set(ended.stdout.strip("[]\n").split(", "))


def test_choices_are_the_files_of_a_group() -> None:
    assert choices("recipe") == ["debug", "flash", "pro"]
    assert CONFIGS == ROOT / "configs"


def test_a_misspelt_key_in_a_file_is_named_before_the_missing_one(tmp_path: Path) -> None:
    text = "\n".join(render(asdict(compose([]).config)))
    (tmp_path / "config.yaml").write_text(text.replace("hidden_size:", "hiden_size:", 1))
    with pytest.raises(ValueError, match=r"^model\.hiden_size = \d+: .*did you mean model\.hidden_size"):
        read(tmp_path / "config.yaml")
