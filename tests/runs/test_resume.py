"""Proves that a run that was stopped anywhere, and whose newest checkpoint may be damaged, ends with the same bits."""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import tiny
from trainer import checkpoint, journal, loop
from trainer.build import Built
from trainer.config import TrainConfig
from trainer.folder import RunFolder
from trainer.manifest import data_file
from trainer.run import resume, train
from trainer.schedule import StepPlan
from trainer.step import Parts, StepResult

Damage = Callable[[Path], None]
DATA = data_file(0)


def stopped_at(config: TrainConfig, stops: Sequence[int]) -> RunFolder:
    """Train in pieces, each beginning as the same command would, and to the end."""
    for stop in stops:
        assert train(config, stop_at=stop) == 0
    assert train(config) == 0
    return tiny.only_run(Path(config.runs_dir))


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> TrainConfig:
    return tiny.config(corpus, tmp_path / "runs")


def test_the_run_has_every_stage(whole: RunFolder) -> None:
    rows = tiny.metrics_rows(whole)
    assert [row["step"] for row in rows] == list(range(1, tiny.STEPS + 1))
    assert [row["schedule/attention"] for row in rows] == ["dense"] * 3 + ["indexer_warmup"] * 2 + ["sparse"] * 4
    assert [row["schedule/row_length"] for row in rows] == [32] * 7 + [48] * 2
    assert [row["schedule/rows"] for row in rows] == [1, 1, 1, 2, 2, 3, 3, 2, 2]
    assert len({row["schedule/mtp_weight"] for row in rows}) == 2


@pytest.mark.parametrize("step", range(tiny.STEPS))
def test_stopped_at_any_step(config: TrainConfig, whole: RunFolder, step: int) -> None:
    tiny.assert_same_run(stopped_at(config, [step]), whole)


def test_stopped_twice(config: TrainConfig, whole: RunFolder) -> None:
    tiny.assert_same_run(stopped_at(config, [2, 5]), whole)


@pytest.mark.slow
def test_stopped_after_every_step(config: TrainConfig, whole: RunFolder) -> None:
    tiny.assert_same_run(stopped_at(config, range(tiny.STEPS)), whole)


def test_bf16_goes_on_from_its_masters(corpus: Path, tmp_path: Path) -> None:
    in_bf16 = [tiny.with_dtype(tiny.config(corpus, tmp_path / name), "bf16") for name in ("whole", "stopped")]
    left, right = stopped_at(in_bf16[0], []), stopped_at(in_bf16[1], [2, 6])
    tiny.assert_same_run(left, right)
    tensors = tiny.final_tensors(left)
    weight, master = tensors["model/embed.weight"], tensors["optimizer/master/embed.weight"]
    assert (weight.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(master.bfloat16(), weight)
    assert not torch.equal(master, weight.float()), "the master has no more bits than the weight"


def truncate(path: Path) -> None:
    """The data file as a full disk or a power cut may leave it."""
    os.truncate(path / DATA, (path / DATA).stat().st_size - 1)


def flip_one_bit(path: Path, name: str = DATA) -> None:
    """One bit of a file, the place drawn with a fixed seed."""
    content = bytearray((path / name).read_bytes())
    draw = random.Random(name)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (path / name).write_bytes(content)


def flip_a_bit_of_the_manifest(path: Path) -> None:
    flip_one_bit(path, checkpoint.MANIFEST)


def lose_commit(path: Path) -> None:
    (path / checkpoint.COMMIT).unlink()


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, flip_a_bit_of_the_manifest, lose_commit])
def test_the_checkpoint_before_a_damaged_one_is_used(
    config: TrainConfig, whole: RunFolder, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, stop_at=7)
    run_folder = tiny.only_run(Path(config.runs_dir))
    found = checkpoint.steps(run_folder.checkpoints)
    assert list(found) == [3, 6, 7]
    damage(found[7])
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    assert "checkpoint step-000007 cannot be used and is now step-000007.set-aside-1" in said
    assert f"going on after step 6 of {tiny.STEPS}" in said
    tiny.assert_same_run(run_folder, whole)


def test_without_a_usable_checkpoint_it_begins_again(
    config: TrainConfig, whole: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, stop_at=7)
    run_folder = tiny.only_run(Path(config.runs_dir))
    found = checkpoint.steps(run_folder.checkpoints)
    for damage, path in zip((truncate, flip_one_bit, lose_commit), found.values(), strict=True):
        damage(path)
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    assert said.count("cannot be used") == 3
    assert "going on after step 0" in said
    tiny.assert_same_run(run_folder, whole)


def test_a_signal_right_after_a_save_does_not_save_again(
    config: TrainConfig, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second checkpoint of the same step would set the first one aside, for ever."""
    save = loop.save

    def save_and_ask_to_stop(built: Built, outlets: loop.Outlets, *rest: Any) -> None:
        save(built, outlets, *rest)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", save_and_ask_to_stop)
        assert train(config) == 143
    run_folder = tiny.only_run(Path(config.runs_dir))
    assert sorted(path.name for path in run_folder.checkpoints.iterdir()) == ["step-000003"]
    train(config)
    tiny.assert_same_run(run_folder, whole)


def test_an_error_is_two_lines_and_the_run_goes_on_from_its_last_checkpoint(
    config: TrainConfig, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take = loop.train_step

    def overflow_in_step_5(parts: Parts, plan: StepPlan, *rest: Any) -> StepResult | None:
        if plan.step + 1 == 5:
            raise OverflowError("a sum is too large")
        return take(parts, plan, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", overflow_in_step_5)
        assert train(config) == 1
    run_folder = tiny.only_run(Path(config.runs_dir))
    resume_line = f"the last checkpoint is kept; to go on from it: ./keel resume {run_folder.path}"
    assert capsys.readouterr().err.splitlines() == ["keel: error: a sum is too large", resume_line]
    end = run_folder.history()[-1]
    assert (end["step"], end["reason"]) == (4, "OverflowError: a sum is too large")
    assert train(config) == 0
    tiny.assert_same_run(run_folder, whole)


# what must not be resumed


def changed_kernels(config: TrainConfig, run_folder: RunFolder) -> TrainConfig:
    return replace(config, deterministic=False)


def changed_torch(config: TrainConfig, run_folder: RunFolder) -> TrainConfig:
    """As if the run had been begun with another torch."""
    path = run_folder.path / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "2.0.0"}))
    return config


def changed_text(config: TrainConfig, run_folder: RunFolder) -> TrainConfig:
    """One more document in the folder that the run reads."""
    source = config.data.sources["text"]
    folder = Path(shutil.copytree(source.path, Path(config.runs_dir).parent / "other"))
    (folder / "more.txt").write_text("one more document")
    return replace(config, data=replace(config.data, sources={"text": replace(source, path=str(folder))}))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (changed_kernels, "deterministic: the checkpoint was made with True, this process has False"),
        (changed_torch, "torch: the checkpoint was made with 2.0.0, this process has "),
        (changed_text, "the training data or the tokenizer differ"),
    ],
)
def test_other_bits_are_refused_unless_allowed(
    config: TrainConfig,
    change: Callable[[TrainConfig, RunFolder], TrainConfig],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(config, stop_at=2)
    changed = change(config, tiny.only_run(Path(config.runs_dir)))
    run_folder = tiny.only_run(Path(config.runs_dir))
    history = run_folder.history()
    with pytest.raises(ValueError, match=rf"^resume = {complaint}.*: expected the same, or --allow-changes"):
        resume(changed, run_folder)
    assert run_folder.history() == history
    assert list(checkpoint.steps(run_folder.checkpoints)) == [2]
    capsys.readouterr()
    resume(changed, run_folder, allow_changes=True, stop_at=3)
    assert capsys.readouterr().out.count(f"bit-equality is off from here on: {complaint}") == 1
    assert list(checkpoint.steps(run_folder.checkpoints)) == [2, 3]
    noted = next(row["changes"] for row in run_folder.history() if row["event"] == "resume")
    assert sum(re.match(complaint, line) is not None for line in noted) == 1


def test_overrides_of_a_resume_are_in_the_history(config: TrainConfig) -> None:
    train(config, stop_at=2)
    run_folder = tiny.only_run(Path(config.runs_dir))
    resume(config, run_folder, stop_at=3)
    resume(replace(config, threads=3), run_folder, stop_at=4)
    resumed = [row for row in run_folder.history() if row["event"] == "resume"]
    assert [row.get("changes") for row in resumed] == [None, [f"threads was {config.threads}, is 3"]]


def test_the_history_says_where_each_session_began(config: TrainConfig) -> None:
    """So that the rows of metrics have their session, and no step is lost or told twice."""
    train(config, stop_at=3)
    run_folder = tiny.only_run(Path(config.runs_dir))
    resume(config, run_folder, stop_at=6)
    # Without its checkpoint, what rows 4 to 6 tell of comes again.
    shutil.rmtree(run_folder.checkpoints / "step-000006")
    resume(config, run_folder)
    begun = [row for row in run_folder.history() if row["event"] != "end"]
    rows = tiny.metrics_rows(run_folder)
    tokens = {0: 0} | {row["step"]: row["tokens"] for row in rows}
    assert [row["step"] for row in rows] == list(range(1, tiny.STEPS + 1))
    assert [(row["event"], row["step"], row["steps_again"]) for row in begun] == [
        ("start", 0, 0),
        ("resume", 3, 0),
        ("resume", 3, 3),
    ]
    assert [row["tokens"] for row in begun] == [tokens[row["step"]] for row in begun]
    measured = {
        row["step"]: row.get("speed/product_flops_per_s") for row in journal.read(run_folder.path / "metrics.jsonl")
    }
    assert {step: rate for step, rate in measured.items() if rate} == {
        1: begun[0]["product_flops_per_s"],
        4: begun[2]["product_flops_per_s"],
    }
    assert all(
        run_folder.provenance.items() >= {(key, row["facts"][key]) for key in ("torch", "commit")} for row in begun
    )


def test_another_number_of_threads_goes_on_with_the_same_bits(config: TrainConfig, whole: RunFolder) -> None:
    train(replace(config, threads=2), stop_at=3)
    run_folder = tiny.only_run(Path(config.runs_dir))
    resume(config, run_folder, stop_at=6)
    resume(replace(config, threads=3), run_folder)
    tiny.assert_same_run(run_folder, whole)


def test_a_finished_run_is_refused(config: TrainConfig) -> None:
    train(config)
    with pytest.raises(ValueError, match=r"^run = .*: expected an unfinished run, this one is finished"):
        resume(config, tiny.only_run(Path(config.runs_dir)))
