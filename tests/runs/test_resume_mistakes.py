"""Deliberate mistakes in resuming: the comparison that a right resume passes must see each."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs import tiny
from trainer import checkpoint, journal, run
from trainer.build import Built
from trainer.config import TrainConfig
from trainer.folder import RunFolder
from trainer.run import resume, train
from trainer.schedule import StepPlan, StepPlans


class ShiftedPlans:
    """Plans whose rows begin one row too late from a step on."""

    def __init__(self, plans: StepPlans, step: int) -> None:
        self.plans, self.step = plans, step

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, number: int) -> StepPlan:
        plan = self.plans[number]
        return replace(plan, first_row=plan.first_row + 1) if number == self.step else plan


def shifted_cursor(patch: pytest.MonkeyPatch) -> None:
    build = run.build

    def shifted(*parts: Any, **named: Any) -> Built:
        built = build(*parts, **named)
        return replace(built, plans=ShiftedPlans(built.plans, 4))

    patch.setattr(run, "build", shifted)


def forgotten_optimizer(patch: pytest.MonkeyPatch) -> None:
    after_restoring(patch, lambda built: [forget(built, "")])


def forgotten_momentum(patch: pytest.MonkeyPatch) -> None:
    after_restoring(patch, lambda built: [forget(built, "momentum/")])


def forgotten_update_counts(patch: pytest.MonkeyPatch) -> None:
    after_restoring(patch, lambda built: [forget(built, "updates/")])


def forgotten_router_bias(patch: pytest.MonkeyPatch) -> None:
    after_restoring(patch, lambda built: [built.parts.model.layers[1].ffn.gate.bias.zero_()])


def repeated_metrics(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal, "keep", lambda path, wanted: None)


def after_restoring(patch: pytest.MonkeyPatch, spoil: Callable[[Built], object]) -> None:
    restore = Built.restore
    patch.setattr(Built, "restore", lambda self, saved: (restore(self, saved), spoil(self)))


def forget(built: Built, prefix: str) -> None:
    for name, tensor in built.parts.optimizer.state_dict().items():
        if name.startswith(prefix):
            tensor.zero_()


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that was stopped after step 4, its newest checkpoint lost: steps 3 and 4 have metrics already."""
    config = tiny.config(corpus, tmp_path_factory.mktemp("stopped") / "runs")
    train(config, stop_at=4)
    shutil.rmtree(checkpoint.steps(tiny.only_run(Path(config.runs_dir)).checkpoints)[4])
    return config


def going_on(stopped: TrainConfig, folder: Path) -> RunFolder:
    """A copy of the stopped run, finished."""
    shutil.copytree(stopped.runs_dir, folder)
    run_folder = tiny.only_run(folder)
    resume(stopped, run_folder)
    return run_folder


def test_without_a_mistake_the_stopped_run_is_the_same(stopped: TrainConfig, whole: RunFolder, tmp_path: Path) -> None:
    tiny.assert_same_run(going_on(stopped, tmp_path / "runs"), whole)


@pytest.mark.parametrize(
    "mistake",
    [
        shifted_cursor,
        forgotten_optimizer,
        forgotten_momentum,
        forgotten_update_counts,
        forgotten_router_bias,
        repeated_metrics,
    ],
)
def test_a_mistake_in_resuming_is_seen(
    stopped: TrainConfig,
    whole: RunFolder,
    tmp_path: Path,
    mistake: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    run_folder = going_on(stopped, tmp_path / "runs")
    with pytest.raises(AssertionError):
        tiny.assert_same_run(run_folder, whole)
