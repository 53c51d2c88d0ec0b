"""Proves the writer: what is saved is what was submitted, errors surface, old ones go, damaged ones are passed over."""

import threading
from pathlib import Path

import pytest
import torch

from tests.trainer.checkpoint_samples import assert_is_step, same_bits, state_of, tensors_of
from trainer import checkpoint, shard
from trainer.manifest import CheckpointError
from trainer.pieces import whole
from trainer.writer import Writer, prune


def save(folder: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(folder, step, whole(tensors_of(step)), state_of(step)) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path) -> None:
    content = bytearray((path / "rank-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "rank-00000.safetensors").write_bytes(content)


# in the background


def test_tensors_may_change_in_place_as_soon_as_submit_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = shard.serialize_file
    monkeypatch.setattr(shard, "serialize_file", lambda *a: (gate.wait(10), real(*a)))
    writer = Writer(tmp_path, 3, 0)
    live, state = tensors_of(1), {"cursor": [1]}
    writer.submit(1, whole(live), state)
    for tensor in live.values():
        tensor.zero_()
    state["cursor"].append(2)
    gate.set()
    writer.close()
    loaded = checkpoint.load(tmp_path / "step-000001")
    assert all(same_bits(loaded.tensors[name], tensor) for name, tensor in tensors_of(1).items())
    assert loaded.state == {"cursor": [1]}


def test_submit_does_not_wait_for_the_disk_but_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, second_done = threading.Event(), threading.Event()
    real = shard.serialize_file
    monkeypatch.setattr(shard, "serialize_file", lambda *a: (gate.wait(10), real(*a)))
    writer = Writer(tmp_path, 3, 0)
    writer.submit(1, whole(tensors_of(1)), state_of(1))
    assert names(tmp_path) in ([], [".writing-step-000001"])
    second = threading.Thread(target=lambda: (writer.submit(2, whole(tensors_of(2)), state_of(2)), second_done.set()))
    second.start()
    assert not second_done.wait(0.1)
    gate.set()
    second.join()
    writer.close()
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert_is_step(checkpoint.load(tmp_path / "step-000001"), 1)
    assert_is_step(checkpoint.load(tmp_path / "step-000002"), 2)


def test_the_next_snapshot_may_have_other_names_shapes_and_dtypes(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 3, 0)
    first = {"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(4)}
    second = {"a": torch.zeros(5), "b": torch.ones(2, 2, dtype=torch.int64), "d": torch.ones(4).mul(2)[::2]}
    writer.submit(1, whole(first), {})
    writer.submit(2, whole(second), {})
    writer.close()
    for step, wanted in ((1, first), (2, second)):
        loaded = checkpoint.load(tmp_path / f"step-{step:06d}").tensors
        assert loaded.keys() == wanted.keys()
        assert all(same_bits(loaded[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("surfaces_at", ["submit", "wait", "close"])
def test_an_error_in_the_background_surfaces_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surfaces_at: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = Writer(tmp_path, 3, 0)
    with monkeypatch.context() as patch:
        patch.setattr(shard, "serialize_file", refuse)
        writer.submit(1, whole(tensors_of(1)), {})
        with pytest.raises(CheckpointError, match=r"step-000001: not saved: .*No space left on device"):
            writer.submit(2, {}, {}) if surfaces_at == "submit" else getattr(writer, surfaces_at)()
    assert names(tmp_path) == []
    if surfaces_at != "close":
        writer.submit(2, whole(tensors_of(2)), state_of(2))
        writer.close()
        assert_is_step(checkpoint.load(tmp_path / "step-000002"), 2)


def test_an_unexpected_error_in_the_background_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "serialize_file", lambda *_: 1 / 0)
    writer = Writer(tmp_path, 3, 0)
    writer.submit(7, whole(tensors_of(7)), {})
    with pytest.raises(CheckpointError, match="step-000007: not saved: ZeroDivisionError"):
        writer.close()


def test_a_state_that_is_not_json_is_refused_at_once(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 3, 0)
    with pytest.raises(CheckpointError, match=r"state\.x"):
        writer.submit(1, {}, {"x": {1, 2}})
    writer.close()


# which ones stay


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep_last=2, keep_every_steps=40)
    for step in range(10, 120, 10):
        writer.submit(step, {}, {})
    writer.close()
    assert list(checkpoint.steps(tmp_path)) == [40, 80, 100, 110]


def test_without_multiples_only_the_newest_stay_in_order_of_number_not_name(tmp_path: Path) -> None:
    save(tmp_path, 999_998, 999_999, 1_000_000, 1_000_001)
    prune(tmp_path, keep_last=2, keep_every_steps=0)
    assert list(checkpoint.steps(tmp_path)) == [1_000_000, 1_000_001]


def test_folders_that_are_no_checkpoints_neither_count_nor_go(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3, 4, 5)
    (paths[4] / "COMMIT").unlink()
    (paths[3] / "manifest.json").write_bytes(b"{}")
    checkpoint.set_aside(paths[0])
    (tmp_path / "notes").mkdir()
    prune(tmp_path, keep_last=1, keep_every_steps=0)
    assert names(tmp_path) == ["notes", "step-000001.set-aside-1", "step-000003", "step-000004", "step-000005"]


def test_leftovers_of_a_killed_writer_are_removed_at_the_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for leftover in (".writing-step-000002", ".deleting-step-000000"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "rank-00000.safetensors").write_bytes(b"half")
    Writer(tmp_path, 3, 0).close()
    assert names(tmp_path) == ["step-000001"]


# the newest that can be used


def test_the_newest_is_used_and_nothing_reported(tmp_path: Path) -> None:
    paths, lines = save(tmp_path, 90, 999_999, 1_000_000), []
    found = checkpoint.newest_valid(tmp_path, lines.append)
    assert found is not None
    assert (found.path, lines) == (paths[2], [])
    assert_is_step(checkpoint.load(found.path), 1_000_000)


def test_damaged_ones_are_reported_and_the_one_before_used(tmp_path: Path) -> None:
    paths, lines = save(tmp_path, 1, 2, 3), []
    damage(paths[1])
    (paths[2] / "COMMIT").unlink()
    before = names(tmp_path)
    found = checkpoint.newest_valid(tmp_path, lines.append)
    assert found is not None
    assert_is_step(checkpoint.load(found.path), 1)
    assert names(tmp_path) == before
    assert len(lines) == 2
    assert "step-000003 cannot be used" in lines[0]
    assert "COMMIT: No such file" in lines[0]
    assert "step-000002 cannot be used" in lines[1]
    assert "tensor " in lines[1]
    assert all("\n" not in line for line in lines)


def test_recover_sets_the_damaged_aside_and_the_step_can_be_saved_again(tmp_path: Path) -> None:
    for round_number in (1, 2):
        paths, lines = save(tmp_path, 1, 2), []
        damage(paths[1])
        found = checkpoint.recover(tmp_path, lines.append)
        assert found is not None
        assert_is_step(checkpoint.load(found.path), 1)
        assert "step-000002 cannot be used and is now step-000002.set-aside-" in lines[0]
        assert (tmp_path / f"step-000002.set-aside-{round_number}").is_dir()
    assert_is_step(checkpoint.load(save(tmp_path, 2)[0]), 2)


def test_without_a_usable_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.recover(tmp_path / "nothing", print) is None
    damage(save(tmp_path, 1)[0])
    assert checkpoint.newest_valid(tmp_path, lambda line: None) is None


def test_saving_a_step_again_keeps_the_first_one_aside(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, whole({"x": torch.ones(1)}), {})
    checkpoint.save(tmp_path, 5, whole({"x": torch.zeros(1)}), {})
    assert checkpoint.load(tmp_path / "step-000005").tensors["x"] == 0
    assert checkpoint.load(tmp_path / "step-000005.set-aside-1").tensors["x"] == 1
