"""Proves that the inventory is the released checkpoint: numbers of tensors and bytes, the fixtures' names and shapes.

The published figures are those of the released index files. Negative controls: single mistakes change the totals.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from safetensors import safe_open

from model.inventory import Stored, TensorSpec, file_tensors, released_tensors
from model.names import config_from_released
from tests.model.released import ROOT, released_config

FIXTURES = ROOT.parent / "shared" / "fixtures" / "model"

PUBLISHED_FILES = {"flash": (69_187, 159_609_485_896), "pro": (145_116, 864_704_792_696)}
"""Tensors and bytes of the released checkpoints, scales included (their index files)."""


def files_and_bytes(specs: Sequence[TensorSpec]) -> tuple[int, int]:
    files = [file for spec in specs for file in file_tensors(spec)]
    return len(files), sum(file.size_bytes for file in files)


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_inventory_has_the_published_number_of_tensors_and_bytes(name: str) -> None:
    assert files_and_bytes(list(released_tensors(released_config(name)))) == PUBLISHED_FILES[name]


@pytest.fixture(scope="module")
def flash() -> list[TensorSpec]:
    return list(released_tensors(released_config("flash")))


def without(end: str) -> Callable[[list[TensorSpec]], list[TensorSpec]]:
    return lambda specs: [spec for spec in specs if not spec.name.endswith(end)]


def doubled(name: str) -> Callable[[list[TensorSpec]], list[TensorSpec]]:
    return lambda specs: specs + [spec for spec in specs if spec.name == name]


def stored_as(end: str, form: Stored) -> Callable[[list[TensorSpec]], list[TensorSpec]]:
    return lambda specs: [replace(spec, stored=form) if spec.name.endswith(end) else spec for spec in specs]


MISTAKES = {
    "MTP norm forgotten": without("mtp.0.norm.weight"),
    "main norm forgotten": without("0.ffn_norm.weight"),
    "head counted twice": doubled("head.weight"),
    "MTP with its own embedding": doubled("embed.weight"),
    "indexer's ape forgotten": without("layers.2.attn.indexer.compressor.ape"),
    "hash table forgotten": without("layers.1.ffn.gate.tid2eid"),
    "router stored in FP32": stored_as("ffn.gate.weight", "F32"),
    "index weights in FP8": stored_as("weights_proj.weight", "F8_E4M3"),
    "mHC in BF16": stored_as("hc_attn_base", "BF16"),
    "shared experts in FP4": stored_as("shared_experts.w2.weight", "FP4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_published_totals_notice_a_mistake(mistake: str, flash: list[TensorSpec]) -> None:
    assert files_and_bytes(MISTAKES[mistake](flash)) != PUBLISHED_FILES["flash"]


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="no fixtures beside this checkout")
@pytest.mark.parametrize("name", ["mixed", "ratio128", "nohash"])
def test_names_and_shapes_are_those_of_the_fixtures(name: str) -> None:
    config = config_from_released(FIXTURES / name)
    with safe_open(FIXTURES / name / "weights.safetensors", framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert {spec.name: spec.shape for spec in released_tensors(config)} == stored
