"""Proves the way from a released folder through a run and back: what training left alone has the bytes it came with.

What it changed decodes to its master, rounded; a run begins at exactly what the codes say, on any part of the model.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.main import main
from model import names
from model.config import InitConfig
from model.logical import locate
from model.transformer import Transformer
from optim.config import OptimConfig
from tests.runs import tiny
from tests.trainer import released_folder as made
from trainer import checkpoint
from trainer.build import build, read_data
from trainer.config import LossConfig, PrecisionConfig, TrainConfig
from trainer.folder import RunFolder
from trainer.precision.elements import E2M1_1X32, E4M3_128X128
from trainer.precision.formats import rounded
from trainer.reader import Reader
from trainer.released import begin
from trainer.released.load import load
from trainer.released.source import ReleasedFolder
from trainer.run import resume, train

FROZEN = ("experts", "attention", "indexer", "mtp_projection", "embedding")
SCALES = (112, 118)
"""So that weights have the size of trained ones."""


def keys(**changes: Any) -> dict[str, Any]:
    """The config.json of the tiny model."""
    model = {key: value for key, value in asdict(tiny.model()).items() if key != "rope_scaling"}
    model |= {"compress_ratios": list(model["compress_ratios"]), "model_type": "deepseek_v4", "expert_dtype": "fp4"}
    return model | changes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `released` and its import `import`."""
    folder = tmp_path_factory.mktemp("place")
    made.write(folder / "released", keys(), made.tensors(keys(), exponents=SCALES))
    assert main(["import", str(folder / "released"), str(folder / "import")]) == 0
    return folder


def config_at(corpus: Path, runs_dir: Path, weights: Path, **changes: Any) -> TrainConfig:
    optim = OptimConfig(freeze=FROZEN)
    init = InitConfig(weights=str(weights))
    return replace(tiny.config(corpus, runs_dir), **({"init": init, "optim": optim} | changes))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(
    request: pytest.FixtureRequest, corpus: Path, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """The tiny run, begun at the import, with half of its groups frozen."""
    runs_dir = tmp_path_factory.mktemp("runs")
    config = config_at(corpus, runs_dir, place / "import", precision=PrecisionConfig(dtype=request.param))
    assert train(config) == 0
    return tiny.only_run(runs_dir)


def masters(run: RunFolder) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 master of every released tensor at the end of a run."""
    saved = tiny.final_tensors(run)
    for name in made.numbers(made.tensors(keys())):
        where = locate(name)
        master = saved.get(f"optimizer/master/{where.parameter}", saved[f"model/{where.parameter}"])
        yield name, where.view(master)


def test_what_is_frozen_comes_back_and_the_rest_is_its_master_rounded(
    run: RunFolder, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run.path), str(tmp_path / "out"), "--json"]) == 0
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    before, after = made.stored_bytes(place / "released"), made.stored_bytes(tmp_path / "out")
    assert before.keys() == after.keys()
    group = {spec.name: spec.group for spec in ReleasedFolder(place / "released").specs.values()}
    alone = {name for name, of in group.items() if of in FROZEN or name.endswith("tid2eid")}
    changed = {name for name in group if before[name] != after[name]}
    assert not changed & alone
    scales = {f"{name.removesuffix('weight')}scale" for name in alone} & before.keys()
    assert all(before[name] == after[name] for name in scales)
    assert {"head.weight", "norm.weight", "layers.0.ffn.shared_experts.w2.weight", "mtp.0.hc_head_fn"} <= changed
    out, stored = ReleasedFolder(tmp_path / "out"), {row["name"]: row for row in rows}
    values = names.tensors(load(out.path))
    for name, master in masters(run):
        expected = as_stored(master, made.kind_of(name))
        where = locate(name)
        assert torch.equal(where.view(values[where.parameter]).detach(), expected), name
        assert stored[name]["exact"] == torch.equal(expected, master.to(expected.dtype)), name
        assert stored[name]["sha256"] == after[name][2]
    assert {stored[name]["scales"] for name in alone if "scales" in stored[name]} == {"kept"}
    assert last["summary"]["tensors"] == len(rows) == len(group)
    assert last["summary"]["step"] == tiny.STEPS


def as_stored(master: Tensor, kind: str) -> Tensor:
    """What a tensor is once it is stored, fp32 (int64)."""
    if kind == "I64":
        return master
    if kind in ("FP4", "F8_E4M3"):
        return rounded(master.float(), E2M1_1X32 if kind == "FP4" else E4M3_128X128)
    return master.float().bfloat16().float() if kind == "BF16" else master.float()


def test_a_step_and_a_checkpoint_can_be_exported_in_every_format(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = checkpoint.steps(run.checkpoints)
    first, path = next(iter(steps.items()))
    assert main(["export", str(run.path), str(tmp_path / "step"), "--step", str(first)]) == 0
    assert main(["export", str(path), str(tmp_path / "folder")]) == 0
    assert made.stored_bytes(tmp_path / "step") == made.stored_bytes(tmp_path / "folder")
    capsys.readouterr()
    assert main(["export", str(run.path), str(tmp_path / "no"), "--step", "77"]) == 2
    assert "--step = 77: expected one of" in capsys.readouterr().err
    for variant in ("fp8", "bf16", "fp32"):
        assert main(["export", str(run.path), str(tmp_path / variant), "--format", variant]) == 0
        assert ReleasedFolder(tmp_path / variant).variant == variant
    values = names.tensors(load(tmp_path / "fp32"))
    for name, master in masters(run):
        where = locate(name)
        value = where.view(values[where.parameter]).detach()
        assert torch.equal(value, master.to(value.dtype)), name


def test_a_run_begins_at_what_the_codes_say(corpus: Path, place: Path, tmp_path: Path) -> None:
    expected = names.tensors(load(place / "released"))
    for dtype in ("fp64", "fp32", "bf16"):
        config = config_at(corpus, tmp_path, place / "import", precision=PrecisionConfig(dtype=dtype))
        data = read_data(config, lambda line: None)
        built = build(config, data, torch.device("cpu"), begins=True)
        for name, tensor in names.tensors(built.parts.model).items():
            assert torch.equal(tensor.detach(), expected[name].detach().to(tensor.dtype)), (dtype, name)
        for name, master in built.parts.optimizer.state_dict().items():
            if name.startswith("master/"):
                assert torch.equal(master, expected[name.removeprefix("master/")].detach()), (dtype, name)


def test_a_rank_reads_the_experts_and_layers_that_it_holds(place: Path) -> None:
    expected = names.tensors(load(place / "released"))
    for held, layers in ((range(2, 4), [1]), (range(1), [0]), (range(4), [])):
        part = Transformer(tiny.model(), torch.float32, held, layers)
        begin.begin(part, str(place / "import"))
        for name, tensor in names.tensors(part).items():
            whole = expected[name].detach()
            mine = whole[held.start : held.stop] if ".experts.w" in name else whole
            assert torch.equal(tensor.detach(), mine), name


def test_a_run_begins_at_another_runs_masters(run: RunFolder, corpus: Path, tmp_path: Path) -> None:
    """In fp32 at a run in bf16 too, whose weights are less than its masters."""
    path = max(checkpoint.steps(run.checkpoints).items())[1]
    config = config_at(corpus, tmp_path, path, optim=OptimConfig())
    built = build(config, read_data(config, lambda line: None), torch.device("cpu"), begins=True)
    begun = names.tensors(built.parts.model)
    for name, master in masters(run):
        where = locate(name)
        assert torch.equal(where.view(begun[where.parameter]).detach(), master), name
    assert all(not t.any() for name, t in built.parts.optimizer.state_dict().items() if "master" not in name)


def test_a_run_that_goes_on_does_not_need_what_it_began_at(corpus: Path, place: Path, tmp_path: Path) -> None:
    """Stopped after four steps, its beginning gone: the end is that of the run that nobody stopped."""
    shutil.copytree(place / "import", tmp_path / "import")
    whole, parts = (config_at(corpus, tmp_path / name, tmp_path / "import") for name in ("whole", "parts"))
    assert train(whole) == 0
    assert train(parts, stop_at=4) == 0
    shutil.rmtree(tmp_path / "import")
    assert resume(parts, tiny.only_run(tmp_path / "parts")) == 0
    tiny.assert_same_run(tiny.only_run(tmp_path / "whole"), tiny.only_run(tmp_path / "parts"))


def test_a_run_that_begins_again_begins_at_the_same_or_not_at_all(corpus: Path, place: Path, tmp_path: Path) -> None:
    """Without a checkpoint left: the same content is taken, another is refused."""
    shutil.copytree(place / "import", tmp_path / "import")
    config = config_at(corpus, tmp_path / "runs", tmp_path / "import")
    assert train(config, stop_at=3) == 0
    run = tiny.only_run(tmp_path / "runs")
    assert run.provenance["init_weights"] == (place / "import" / "COMMIT").read_text().strip()
    kept = tiny.final_tensors(run)
    for path in checkpoint.steps(run.checkpoints).values():
        shutil.rmtree(path)
    assert train(config, stop_at=3) == 0
    assert tiny.different_tensors(kept, tiny.final_tensors(run)) == []
    for path in checkpoint.steps(run.checkpoints).values():
        shutil.rmtree(path)
    shutil.rmtree(tmp_path / "import")
    made.write(tmp_path / "other", keys(), made.tensors(keys(), 1, exponents=SCALES))
    assert main(["import", str(tmp_path / "other"), str(tmp_path / "import")]) == 0
    with pytest.raises(ValueError, match=r"init\.weights = .*: expected the content that this run began at"):
        resume(config, run)


def test_wrong_weights_are_refused_before_a_run_is_made(corpus: Path, place: Path, tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"

    def refusal(weights: Path, **changes: Any) -> str:
        with pytest.raises(ValueError, match="expected") as caught:
            train(config_at(corpus, runs_dir, weights, **changes))
        assert not runs_dir.exists()
        return str(caught.value).replace(str(place), "PLACE").replace(str(tmp_path), "TMP")

    assert refusal(place / "nowhere") == "init.weights = PLACE/nowhere: expected what keel import made, or a checkpoint"
    assert refusal(place / "released").endswith("; a released folder goes through keel import first")
    other = refusal(place / "import", model=tiny.model(rope_theta=5.0))
    assert other == "model.rope_theta = 5.0: expected 10000.0, which init.weights=PLACE/import has"
    shutil.copytree(place / "import", tmp_path / "import")
    file = tmp_path / "import" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = refusal(tmp_path / "import")
    assert damaged.startswith("init.weights = TMP/import: expected weights that verify: TMP/import/rank-00000.safetens")


def test_another_runs_model_is_refused(whole: RunFolder, corpus: Path, tmp_path: Path) -> None:
    path = max(checkpoint.steps(whole.checkpoints).items())[1]
    config = config_at(corpus, tmp_path, path, model=tiny.model(moe_intermediate_size=32))
    with pytest.raises(
        ValueError, match=r"init.weights = .*: expected model/layers.0.ffn.experts.w1 to be \[4, 32, 16\]"
    ):
        train(config)
    ratios = config.model.compress_ratios
    shorter = tiny.model(num_hidden_layers=config.model.num_hidden_layers - 1, compress_ratios=(*ratios[:-2], 0))
    with pytest.raises(ValueError, match=r"init.weights = .*: expected no model/layers\.\d\..*, the model has none"):
        train(config_at(corpus, tmp_path, path, model=shorter))


def test_an_export_whose_beginning_is_gone_says_so(
    corpus: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "import", tmp_path / "import")
    config = config_at(corpus, tmp_path / "runs", tmp_path / "import", loss=LossConfig(bias_update_speed=0.0))
    assert train(config, stop_at=3) == 0
    run = tiny.only_run(tmp_path / "runs")
    shutil.rmtree(tmp_path / "import")
    assert main(["export", str(run.path), str(tmp_path / "out")]) == 2
    assert "expected the folder that the run began at, whose scales are kept; or --like" in capsys.readouterr().err
    assert main(["export", str(run.path), str(tmp_path / "fresh"), "--like", "none"]) == 0
    assert main(["export", str(run.path), str(tmp_path / "like"), "--like", str(place / "released")]) == 0
    before, like = made.stored_bytes(place / "released"), made.stored_bytes(tmp_path / "like")
    name = "layers.1.ffn.experts.3.w2.weight"
    assert before[name] == like[name]
    assert Reader(max(checkpoint.steps(run.checkpoints).items())[1]).step == 3
