"""Proves that what is wrong with a folder is one line with exit code 2 that names it, and leaves nothing behind."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.main import main
from tests.trainer import released_folder as made

EXPERT, DENSE = "layers.1.ffn.experts.1.w3", "layers.1.attn.wq_b"
SHARD = "model-00002-of-00002.safetensors"
Stored = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole folder, `released` below the working folder."""
    return write(tmp_path, lambda stored: None)


def write(tmp_path: Path, change: Callable[[Stored], Any], **keys: Any) -> Path:
    config = made.config(**keys)
    stored = made.tensors(config)
    change(stored)
    return made.write(tmp_path / "released", config, stored)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with code 2."""
    code, said = main(words), capsys.readouterr()
    assert (code, said.out) == (2, ""), said
    (line,) = [line for line in said.err.splitlines() if "MB/s" not in line]
    return line.removeprefix("keel: error: ")


def put(name: str, value: Tensor | None) -> Callable[[Stored], Any]:
    return lambda stored: stored.pop(name) if value is None else stored.update({name: value})


def at(name: str, index: tuple[int, ...], value: Any) -> Callable[[Stored], Any]:
    """Set one number, or the bits of one code."""

    def change(stored: Stored) -> None:
        tensor = stored[name].clone()
        (tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor)[index] = value
        stored[name] = tensor

    return change


WRONG = {
    "missing": (put("norm.weight", None), "norm.weight = nothing: expected BF16 [160], as a folder of format released"),
    "scales missing": (put(f"{DENSE}.scale", None), f"{DENSE}.scale = nothing: expected F8_E8M0 [1, 2]"),
    "unexpected": (put("extra.weight", torch.zeros(2)), "extra.weight = F32 [2]: expected no such tensor"),
    "a scale of a norm": (put("norm.scale", torch.zeros(2)), "norm.scale = F32 [2]: expected no such tensor"),
    "shape": (put("norm.weight", torch.zeros(3).bfloat16()), "norm.weight = BF16 [3]: expected BF16 [160]"),
    "type": (put("norm.weight", torch.zeros(160)), "norm.weight = F32 [160]: expected BF16 [160]"),
    "type of scales": (put(f"{DENSE}.scale", torch.ones(1, 2)), f"{DENSE}.scale = F32 [1, 2]: expected F8_E8M0"),
    "transposed": (
        put(f"{EXPERT}.weight", torch.zeros(160, 72, dtype=torch.int8)),
        f"{EXPERT}.weight = I8 [160, 72]: expected I8 [144, 80]",
    ),
    "NaN code": (at(f"{DENSE}.weight", (30, 129), 0xFF), f"{DENSE}.weight[30, 129] = the code of NaN: expected the co"),
    "scale 255": (at(f"{EXPERT}.scale", (143, 4), 255), f"{EXPERT}.scale[143, 4] = 255, the NaN of E8M0: expected a "),
    "too large": (
        lambda stored: (at(f"{DENSE}.scale", (0, 0), 254)(stored), at(f"{DENSE}.weight", (0, 0), 0x7E)(stored)),
        f"{DENSE}.weight[0, 0] = inf: expected a finite number in fp32",
    ),
    "not finite": (at("norm.weight", (7,), float("nan")), "norm.weight[7] = nan: expected a finite number in fp32"),
    "no expert": (at("layers.0.ffn.gate.tid2eid", (60, 1), 3), "tid2eid[60, 1] = 3: expected the number of an expert"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_folder_is_refused(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = WRONG[mistake]
    write(tmp_path, change)
    monkeypatch.chdir(tmp_path)
    line = refused(["import", "released", "out"], capsys)
    assert expected in line
    assert line.startswith("released")
    assert os.listdir() == ["released"]


def test_scales_that_are_no_power_of_two_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FP8 with F32 scales, as -Base has it."""
    config = made.config()
    monkeypatch.chdir(tmp_path)
    for value in (0.75, 0.0, -1.0, float("inf"), float("nan"), 2.0**-128):
        stored = made.tensors(config, variant="fp8")
        stored[f"{DENSE}.scale"][0, 1] = value
        made.write(tmp_path / "released", config, stored)
        assert f"{DENSE}.scale[0, 1] = {value}: expected a power of two" in refused(["import", "released", "o"], capsys)
        shutil.rmtree("released")
    stored = made.tensors(config, variant="fp8")
    stored[f"{DENSE}.scale"][0] = torch.tensor([2.0**-127, 2.0**-126])
    made.write(tmp_path / "released", config, stored)
    assert main(["import", "released", "import"]) == 0
    assert main(["export", "import", "out"]) == 0
    assert made.stored_bytes(Path("out")) == made.stored_bytes(Path("released"))


def truncate(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1])


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file; None takes one out."""

    def change(folder: Path) -> None:
        keys = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))

    return change


def reindex(folder: Path) -> None:
    where = json.loads((folder / made.INDEX).read_text())["weight_map"]
    edit(made.INDEX, weight_map=where | {"norm.weight": SHARD})(folder)
    assert where["norm.weight"] != SHARD


def reindex_file(folder: Path, name: str) -> None:
    """The index says `name` instead of SHARD."""
    (folder / made.INDEX).write_text((folder / made.INDEX).read_text().replace(SHARD, name))


def relink(folder: Path, target: str) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(target)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, rf"released/{SHARD} = \d+ bytes: expected a whole safetensors file"),
    "a file missing": (
        lambda f: (f / SHARD).unlink(),
        f"released/{SHARD} = nothing: expected a file model.*index.json",
    ),
    "another file name": (
        lambda f: (f / SHARD).rename(f / "part.safetensors") and reindex_file(f, "part.safetensors"),
        r"released/part.safetensors = another name: expected a file model\*.safetensors or weights",
    ),
    "a broken link": (
        lambda f: relink(f, "nowhere"),
        rf"released/{SHARD} = nothing: expected a whole safetensors file",
    ),
    "a circle of links": (
        lambda f: relink(f, SHARD),
        rf"released/{SHARD} = nothing: expected a whole safetensors file",
    ),
    "no files": (lambda f: [one.unlink() for one in f.glob("*model*")], "FOLDER = released: expected model"),
    "twice": (lambda f: shutil.copy(f / SHARD, f / "model-3.safetensors"), r"model-3\.safetensors: .* = a second one"),
    "another index": (reindex, f"index.json: norm.weight = {SHARD}: expected model-00001-of-00002.saf"),
    "no index": (lambda f: (f / made.INDEX).write_text("{}"), "index.json = no index: expected a weight_map"),
    "an empty index": (
        lambda f: (f / made.INDEX).write_text('{"weight_map": {}}'),
        "index.json: embed.weight = nothing",
    ),
    "a nested index": (lambda f: (f / made.INDEX).write_text("[" * 100_000), "index.json = no index: expected a weigh"),
    "unknown key": (edit("config.json", sliding_windw=8), "config.json: sliding_windw = 8: expected a key of ModelCo"),
    "key missing": (edit("config.json", head_dim=None), "config.json: head_dim = nothing: expected a value"),
    "wrong type": (edit("config.json", hidden_size="8"), "config.json: hidden_size = '8': expected an integer"),
    "another router": (
        edit("config.json", scoring_func="sigmoid"),
        'config.json: scoring_func = .*: expected "sqrtsof',
    ),
    "contradiction": (
        edit("config.json", num_hidden_layers=4),
        r"config.json: compress_ratios = \[.*: expected 5 entries",
    ),
    "no object": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config.json: content = \[\]: expected a JSON object",
    ),
    "nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json = no JSON: expected an object"),
    "another model": (
        edit("config.json", hidden_size=128),
        r"embed\.weight = BF16 \[61, 160\]: expected BF16 \[61,",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json = no JSON: expected an object"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json = no text: expected JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "FOLDER = released: expected a model's folder with a config"),
}


@pytest.mark.parametrize("mistake", FILES)
def test_a_wrong_file_is_refused(
    mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = FILES[mistake]
    change(folder)
    monkeypatch.chdir(folder.parent)
    line = refused(["import", "released", "out"], capsys)
    assert re.search(expected, line), line
    assert os.listdir() == ["released"]


def test_words_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["import", "released", "import"]) == 0
    capsys.readouterr()
    edit("config.json", rope_theta=2.0)(folder)
    for words, expected in {
        "import released": "FOLDER OUT = released: expected a model's folder and a new folder",
        "import released import": "OUT = import: expected a folder that does not exist yet",
        "export import": "SOURCE OUT = import: expected a run, checkpoint or import and a new folder",
        "export import released": "OUT = released: expected a folder that does not exist yet",
        "export import o --format fp16": "--format = fp16: expected one of released, fp8, bf16, fp32",
        "export import o --shard-bytes 0": "--shard-bytes = 0: expected a positive number",
        "export import o --step 3": "--step = 3: expected none beside a checkpoint's own folder",
        "export import o --like nowhere": "FOLDER = nowhere: expected a model's folder with a config.json",
        "export import o --like released": "--like: rope_theta = 2.0: expected 10000.0, as the exported model has it",
        "export released o": "SOURCE = released: expected a run, a checkpoint or an import; keel import makes it one",
        "export nowhere o": "RUN = nowhere: expected the folder of a run or its name (runs/ has none yet)",
    }.items():
        assert refused(words.split(), capsys) == expected
    assert sorted(os.listdir()) == ["import", "released"]


def test_a_damaged_import_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["import", "released", "import"]) == 0
    shutil.copytree("import", "whole")
    capsys.readouterr()
    file = Path("import/rank-00000.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    line = refused(["export", "import", "out"], capsys)
    assert line.startswith("--like = import: expected scales that verify: import/rank-00000.safetensors: tensor scales")
    line = refused(["export", "whole", "out", "--like", "import"], capsys)
    assert line.startswith("--like = import: expected scales that verify: ")
    content[-9] ^= 4
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    line = refused(["export", "import", "out"], capsys)
    assert line.startswith("SOURCE = import: expected weights that verify: import/rank-00000.safetensors: tensor model")
    file.unlink()
    assert "rank-00000.safetensors" in refused(["export", "import", "out"], capsys)
    Path("import/COMMIT").write_text("0")
    for words in (["import", "out"], ["whole", "out", "--like", "import"]):
        assert "import/manifest.json: has SHA-256" in refused(["export", *words], capsys)
    assert sorted(os.listdir()) == ["import", "released", "whole"]


def test_what_there_is_no_room_for_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    line = refused(["import", "released", "out"], capsys)
    assert re.fullmatch(r"OUT = out: expected a disk that takes it \([\d,]+ bytes to write, 5 free on the disk\)", line)
    assert os.listdir() == ["released"]
