"""Proves that our tensors are the released checkpoint's: same names and values, nothing lost, nothing twice.

Also that the optimizer's logical tensors partition the parameters, and that a folder that does not fit is refused with
one line that names the tensor or the key.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.count import parameters
from model.inventory import released_tensors
from model.logical import alias_of, locate, logical_tensors, parameter_shapes
from model.names import NOT_ARCHITECTURE, config_from_keys, config_from_released, load_released, tensors
from model.transformer import Transformer
from tests.model.released import released_config
from tests.oracles.cases import random_case, write_released

SEEDS = (0, 1, 2)
GOLDEN = Path(__file__).parents[1] / "golden"


def random_config(seed: int, folder: Path) -> ModelConfig:
    write_released(folder, *random_case(seed, num_nextn_predict_layers=int(seed != 1)))
    return config_from_released(folder)


@pytest.fixture(params=["debug", *SEEDS])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> ModelConfig:
    """The debug model and random ones, one of them without MTP."""
    return released_config("debug") if request.param == "debug" else random_config(request.param, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A released folder that fits."""
    write_released(tmp_path / "released", *random_case(5))
    return tmp_path / "released"


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")


def test_released_tensors_cover_every_element_once(config: ModelConfig) -> None:
    mine, times = tensors(Transformer(config)), {}
    for name, tensor in mine.items():
        times[name] = torch.zeros(tensor.shape, dtype=torch.int64)
    for spec in released_tensors(config):
        where = locate(spec.name)
        part = where.view(times[where.parameter])
        assert part.shape == spec.shape, spec.name
        part += 1
    assert all(count.eq(1).all() for count in times.values())


def test_shapes_are_those_of_the_parameters(config: ModelConfig) -> None:
    named = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters() if alias_of(name) is None}
    assert parameter_shapes(config) == named


def test_logical_tensors_partition_the_parameters(config: ModelConfig) -> None:
    named = {name: p for name, p in Transformer(config).named_parameters() if alias_of(name) is None}
    rows = {name: torch.zeros(len(parameter), dtype=torch.int64) for name, parameter in named.items()}
    members = list(logical_tensors(config))
    for member in members:
        rows[member.parameter][member.start : member.stop] += 1
    assert all(count.eq(1).all() for count in rows.values())
    assert len({member.name for member in members}) == len(members)


def test_the_number_of_parameters_is_the_counted_one(config: ModelConfig) -> None:
    model = Transformer(config)
    shared = [name for name, _ in model.named_parameters() if alias_of(name)]
    assert len(shared) == 2 * len(model.mtp)
    sizes = [p.numel() for name, p in model.named_parameters() if name not in shared]
    assert sum(sizes) == parameters(config).total
    assert sum(buffer.numel() for buffer in model.buffers()) == parameters(config).buffers


def test_logical_matrices_are_those_of_the_specification(tmp_path: Path) -> None:
    write_released(tmp_path, *random_case(0, compress_ratios=[0, 4, 8, 0]))
    config = config_from_released(tmp_path)
    members = {member.name: member for member in logical_tensors(config)}
    N, width = config.hc_mult, config.o_lora_rank
    expert = members["layers.2.ffn.experts.5.w1.weight"]
    assert (expert.parameter, expert.start, expert.stop) == ("layers.2.ffn.experts.w1", 5, 6)
    group = members["layers.2.attn.wo_a.weight.group1"]
    assert (group.parameter, group.start, group.stop) == ("layers.2.attn.wo_a.weight", width, 2 * width)
    mixes = [members[f"layers.2.hc_attn_fn.{part}"] for part in ("pre", "post", "comb")]
    assert [(m.start, m.stop) for m in mixes] == [(0, N), (N, 2 * N), (2 * N, 2 * N + N * N)]
    for prefix, channels in (("attn.compressor", config.head_dim), ("attn.indexer.compressor", config.index_head_dim)):
        halves = [members[f"layers.1.{prefix}.wgate.weight.{part}"] for part in ("previous", "current")]
        assert [(m.start, m.stop) for m in halves] == [(0, channels), (channels, 2 * channels)]
    assert members["layers.2.attn.compressor.wkv.weight"].stop == config.head_dim, "HCA has one series"


def test_kinds_are_those_of_the_specification() -> None:
    """AdamW: tables (embedding, head) and vectors (norms, sinks, ape, static mHC); Muon: all other matrices."""
    members = list(logical_tensors(released_config("debug")))
    assert {member.name for member in members if member.kind == "table"} == {"embed.weight", "head.weight"}
    vectors = {member.name.split(".")[-1] for member in members if member.kind == "vector"}
    static = {f"hc_{site}_{part}" for site in ("attn", "ffn", "head") for part in ("base", "scale")}
    assert vectors == {"weight", "attn_sink", "ape"} | static
    norms = [member.name for member in members if member.kind == "vector" and member.name.endswith(".weight")]
    assert norms
    assert all(name.endswith("norm.weight") for name in norms)
    matrices = {member.name.split(".")[-1] for member in members if member.kind == "matrix"}
    assert matrices == {"weight", "pre", "post", "comb", "previous", "current", "group0", "group1", "hc_head_fn"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_released_folder_round_trips(folder: Path, dtype: torch.dtype) -> None:
    model, released = load_released(folder, dtype), stored(folder)
    config = model.config
    assert {spec.name for spec in released_tensors(config)} == set(released)
    for spec in released_tensors(config):
        where = locate(spec.name)
        value = where.view(tensors(model)[where.parameter])
        assert torch.equal(value.detach(), released[spec.name].to(value.dtype)), spec.name


def test_several_files_in_other_precisions_are_read(folder: Path) -> None:
    released, exact = stored(folder), load_released(folder, torch.float64)
    (folder / "weights.safetensors").unlink()
    names = sorted(released)
    rounded = {name: v.bfloat16() if v.is_floating_point() else v for name, v in released.items()}
    save_file({name: rounded[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: rounded[name] for name in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    found = tensors(load_released(folder, torch.float64))
    for name, value in tensors(exact).items():
        expected = value.bfloat16().double() if value.is_floating_point() else value
        assert torch.equal(found[name], expected), name


def test_the_mtp_branch_shares_storage_and_has_its_own_gradients(folder: Path) -> None:
    model = load_released(folder)
    branch = model.mtp[0]
    for ours, theirs in ((model.embed.weight, branch.embed.weight), (model.head.weight, branch.head.weight)):
        assert ours is not theirs
        assert ours.data_ptr() == theirs.data_ptr()
    assert alias_of("mtp.0.embed.weight") == "embed.weight"
    assert alias_of("mtp.0.head.weight") == "head.weight"
    assert alias_of("head.weight") is None
    assert alias_of("mtp.0.hc_head_fn") is None
    assert not {"mtp.0.embed.weight", "mtp.0.head.weight"} & tensors(model).keys()
    moved = model.to(torch.float64)
    moved.share_weights()
    assert moved.embed.weight.data_ptr() == moved.mtp[0].embed.weight.data_ptr()


def change(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of the folder, or take them out (None). Names are written with __ for the dot."""
    released = stored(folder)
    for key, value in changes.items():
        name = key.replace("__", ".")
        released.pop(name, None)
        if value is not None:
            released[name] = value
    save_file(released, folder / "weights.safetensors")


REFUSED = {
    "missing": ({"norm__weight": None}, r"norm\.weight: expected this tensor"),
    "unexpected": ({"extra__weight": torch.zeros(2)}, r"extra\.weight: expected no such tensor"),
    "shape": ({"norm__weight": torch.zeros(3)}, r"norm\.weight = torch\.float32 \[3\]: expected .* \[\d+\]"),
    "quantised": ({"norm__weight": "fp8"}, r"norm\.weight = torch\.float8_e4m3fn .*: expected an unquantised tensor"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_folder_that_does_not_fit_is_refused(folder: Path, mistake: str) -> None:
    changes, message = REFUSED[mistake]
    shape = stored(folder)["norm.weight"].shape
    change(folder, **{k: torch.zeros(shape).to(torch.float8_e4m3fn) if v == "fp8" else v for k, v in changes.items()})
    with pytest.raises(ValueError, match=message):
        load_released(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected weights\*\.safetensors or model\*\.safetensors"):
        load_released(folder)


def test_unknown_keys_are_refused_and_known_others_ignored(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | dict.fromkeys(NOT_ARCHITECTURE)))
    expected = config_from_released(folder)
    (folder / "config.json").write_text(json.dumps(raw | {"sliding_windw": 8}))
    with pytest.raises(ValueError, match="sliding_windw = 8: expected a key of ModelConfig"):
        config_from_released(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    assert config_from_released(folder) == expected


def test_the_released_format_needs_no_more_than_the_folder(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert load_released(str(copy)).config == load_released(folder).config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid': expected \"sqrtsoftplus\""),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True: expected false"),
        ({"norm_topk_prob": 1}, "norm_topk_prob = 1: expected true"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2: expected 0 or 1"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers = 3.0: expected an integer"),
        ({"hidden_size": True}, "hidden_size = True: expected an integer"),
        ({"rope_theta": 10**400}, "rope_theta = 1000"),
        ({"rope_theta": math.inf}, "rope_theta = inf: expected a finite number"),
        ({"compress_ratios": [0, 4.0, 0]}, "compress_ratios = [0, 4.0, 0]: expected a list of integers"),
        ({"compress_ratios": [0]}, "compress_ratios = [0]: expected "),
        ({"rope_scaling": []}, "rope_scaling = []: expected a JSON object"),
        (
            {"rope_scaling": {"factor": 0.5, "original_max_position_embeddings": 8}},
            "rope_scaling.factor = 0.5: expected",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type = 'linear': expected \"yarn\""),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.original_max_position_embeddings = nothing: expected a value"),
    ],
)
def test_a_config_of_another_model_is_refused_by_file_and_key(change: dict[str, Any], expected: str) -> None:
    """What nothing else would see: a folder of the same shapes would be read as a V4 model and compute otherwise."""
    path, raw = Path("there/config.json"), json.loads((GOLDEN / "config.json").read_text())
    with pytest.raises(ValueError, match=re.escape(f"there/config.json: {expected}")):
        config_from_keys(path, raw | change)


def test_numbers_of_a_config_are_written_as_json_likes() -> None:
    raw = json.loads((GOLDEN / "config.json").read_text()) | {"rope_theta": 10000, "attention_dropout": 0}
    assert config_from_keys(Path("config.json"), raw).rope_theta == 10000.0
    assert config_from_keys(Path("config.json"), raw | {"rope_scaling": None}).rope_scaling is None
