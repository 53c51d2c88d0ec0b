"""Proves that a checkpoint comes back bit for bit, and that no damage to any of its files goes unnoticed."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

from tests.trainer.checkpoint_samples import assert_is_step, random_bits, same_bits, state_of, tensors_of
from trainer import checkpoint
from trainer.manifest import BLOCK_BYTES, DTYPES, CheckpointError, digest
from trainer.pieces import whole

FILES = ("COMMIT", "manifest.json", "rank-00000.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A committed checkpoint of step 600, alone in its folder."""
    return checkpoint.save(tmp_path / "checkpoints", 600, whole(tensors_of(600)), state_of(600))


def forge(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest and commits the change, as only a hostile or a buggy writer would."""
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    content = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(content)
    (path / "COMMIT").write_text(f"{digest(content)}\n")


# the way there and back


def test_a_checkpoint_comes_back_bit_for_bit_in_order(saved: Path) -> None:
    assert saved.name == "step-000600"
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)
    assert_is_step(checkpoint.load(saved), 600)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    seed=st.integers(0, 2**31),
)
def test_every_dtype_and_shape_comes_back(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    tensor = random_bits(dtype, shape, torch.Generator().manual_seed(seed))
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, whole({"x": tensor}), {}))
    assert same_bits(loaded.tensors["x"], tensor)
    shutil.rmtree(tmp_path / "step-000001")


def test_views_parameters_and_shared_memory_are_saved_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "row": base[1],
        "column": base[:, 1],
        "base": base,
        "parameter": torch.nn.Parameter(base),
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, 0, whole(tensors), {})).tensors
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_data_file_is_ordinary_safetensors(saved: Path) -> None:
    read = load_file(saved / "rank-00000.safetensors")
    assert all(same_bits(read[name], tensor) for name, tensor in tensors_of(600).items())


def test_loaded_tensors_do_not_depend_on_the_file(saved: Path) -> None:
    loaded = checkpoint.load(saved)
    (saved / "rank-00000.safetensors").write_bytes(b"")
    assert_is_step(loaded, 600)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.tensors.values())


@pytest.mark.parametrize("value", [2**80, -0.0, 0.1, 5e-324, True, None, "ä\n", [1, 1.0, [True]], {"a": {"b": []}}])
def test_state_comes_back_with_its_types(tmp_path: Path, value: object) -> None:
    state = checkpoint.load(checkpoint.save(tmp_path, 0, {}, {"value": value})).state
    assert repr(state) == repr({"value": value})


@pytest.mark.parametrize("value", [math.nan, math.inf, (1, 2), {1: 2}, {"a": [{1}]}, torch.tensor(1), object()])
def test_state_that_would_come_back_different_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"state\.value = .*expected a JSON value"):
        checkpoint.save(tmp_path, 0, {}, {"value": value})
    assert not list(tmp_path.iterdir())


def test_an_unsupported_dtype_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor x: torch\.complex64 cannot be saved"):
        checkpoint.save(tmp_path, 0, whole({"x": torch.zeros(2, dtype=torch.complex64)}), {})


def test_the_name_that_safetensors_keeps_for_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor __metadata__: expected another name"):
        checkpoint.save(tmp_path, 0, whole({"__metadata__": torch.zeros(2)}), {})


# damage


def test_one_flipped_bit_anywhere_is_found(saved: Path) -> None:
    draw = random.Random(1)
    for file in FILES:
        content = (saved / file).read_bytes()
        for _ in range(150):
            position, bit = draw.randrange(len(content)), draw.randrange(8)
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            (saved / file).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                checkpoint.load(saved)
        (saved / file).write_bytes(content)
    assert_is_step(checkpoint.load(saved), 600)


@pytest.mark.slow
def test_every_single_bit_of_a_small_checkpoint_is_guarded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, whole({"a": torch.randn(3), "b": torch.tensor(1)}), {"step": 1})
    for file in FILES:
        content = (path / file).read_bytes()
        for position in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[position // 8] ^= 1 << position % 8
            (path / file).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                checkpoint.load(path)
        (path / file).write_bytes(content)


def test_truncation_at_any_length_and_extension_are_found(saved: Path) -> None:
    draw = random.Random(2)
    for file in FILES:
        content = (saved / file).read_bytes()
        lengths = {0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(40))}
        for changed in [content[:length] for length in lengths] + [content + b"\0", content + b"\n"]:
            (saved / file).write_bytes(changed)
            with pytest.raises(CheckpointError):
                checkpoint.load(saved)
        (saved / file).write_bytes(content)
    assert_is_step(checkpoint.load(saved), 600)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(saved)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_checkpoint_is_found(saved: Path, file: str) -> None:
    other = checkpoint.save(saved.parent, 700, whole(tensors_of(700)), state_of(700))
    shutil.copy(other / file, saved / file)
    with pytest.raises(CheckpointError):
        checkpoint.load(saved)


def test_all_files_of_another_checkpoint_are_found(saved: Path) -> None:
    saved.rename(saved.with_name("step-000700"))
    with pytest.raises(CheckpointError, match="is a checkpoint of step 600"):
        checkpoint.load(saved.with_name("step-000700"))


def test_the_error_names_file_tensor_and_bytes(tmp_path: Path) -> None:
    size = BLOCK_BYTES // 8 + 10
    tensors = {"first": torch.zeros(size, dtype=torch.int64), "second": torch.ones(1)}
    path = checkpoint.save(tmp_path, 1, whole(tensors), {})
    data = path / "rank-00000.safetensors"
    content = bytearray(data.read_bytes())
    start = json.loads((path / "manifest.json").read_text())["tensors"]["first"]["pieces"][0]["start"]
    content[start + BLOCK_BYTES + 3] ^= 1
    data.write_bytes(content)
    where = f"tensor first, bytes {start + BLOCK_BYTES} to {start + 8 * size}"
    with pytest.raises(CheckpointError, match=rf"step-000001/rank-00000\.safetensors: {where}: SHA-256 is"):
        checkpoint.load(path)


def point_outside(manifest: dict[str, Any]) -> None:
    manifest["files"] = {"../../secret": manifest["files"]["rank-00000.safetensors"]}
    for tensor in manifest["tensors"].values():
        tensor["pieces"][0]["file"] = "../../secret"


def bias(manifest: dict[str, Any]) -> dict[str, Any]:
    """The one piece of a tensor of 1024 rows."""
    return manifest["tensors"]["router/bias"]["pieces"][0]


def last(manifest: dict[str, Any]) -> str:
    """The tensor at the end of the file."""
    return max(manifest["tensors"], key=lambda name: manifest["tensors"][name]["pieces"][0]["stop"])


FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a file outside": point_outside,
    "an unknown format": lambda m: m.update(format="keel-checkpoint-9"),
    "other block size": lambda m: m.update(block_bytes=1 << 30),
    "no tensors": lambda m: m.pop("tensors"),
    "a gap": lambda m: m["tensors"].pop("router/bias"),
    "a gap at the end": lambda m: m["tensors"].pop(last(m)),
    "an overlap": lambda m: m["tensors"].update(copy=m["tensors"]["router/bias"]),
    "an enormous shape": lambda m: m["tensors"]["router/bias"].update(shape=[2**60]),
    "a negative shape": lambda m: m["tensors"]["model/embed.weight"].update(shape=[-64, -96]),
    "an unknown dtype": lambda m: m["tensors"]["router/bias"].update(dtype="object"),
    "a missing hash": lambda m: bias(m).update(hashes=[]),
    "a shape of fractions": lambda m: m["tensors"]["router/bias"].update(shape=[1024.0]),
    "a start that is text": lambda m: bias(m).update(start="0"),
    "a step that is text": lambda m: m.update(step="600"),
    "a state that is a list": lambda m: m.update(state=[]),
    "an entry that is a list": lambda m: m["tensors"].update({"router/bias": []}),
    "a file that is a list": lambda m: m.update(files=[]),
    "a missing file entry": lambda m: m.update(files={}),
    "rows of fractions": lambda m: bias(m).update(stop_row=1024.0),
    "rows before the first": lambda m: bias(m).update(start_row=-1),
    "a first row that is missing": lambda m: bias(m).update(start_row=1),
    "a last row that is missing": lambda m: bias(m).update(stop_row=1023),
    "a row too many": lambda m: bias(m).update(stop_row=1025),
    "no pieces": lambda m: m["tensors"]["router/bias"].update(pieces=[]),
    "rows twice": lambda m: m["tensors"]["router/bias"]["pieces"].append(bias(m)),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_manifest_that_makes_no_sense_is_refused_although_committed(saved: Path, kind: str) -> None:
    forge(saved, FORGERIES[kind])
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.load(saved)


def test_a_name_that_occurs_twice_is_refused(saved: Path) -> None:
    content = (saved / "manifest.json").read_bytes().replace(b'"router/bias"', b'"optimizer/steps"')
    (saved / "manifest.json").write_bytes(content)
    (saved / "COMMIT").write_text(f"{digest(content)}\n")
    with pytest.raises(CheckpointError, match="a name occurs twice"):
        checkpoint.load(saved)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-000001: there is no such checkpoint"):
        checkpoint.load(tmp_path / "step-000001")
