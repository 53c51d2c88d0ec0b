"""Faults planted in the model of a run right before a step, and what the run leaves of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import tiny
from trainer import loop
from trainer.config import TrainConfig
from trainer.folder import RunFolder
from trainer.run import train
from trainer.step import train_step

STEP = 7
"""The step that fails: the second of the sparse stage; the checkpoint before it is of step 6."""
WARM_UP_STEP = 4
Plant = Callable[[Any], None]


def plant_before(monkeypatch: pytest.MonkeyPatch, step: int, plant: Plant) -> None:
    """Change the model right before a step."""

    def take(parts: Any, plan: Any, stopped: Any, verify: Any) -> Any:
        if plan.step + 1 == step:
            with torch.no_grad():
                plant(parts.model)
        return train_step(parts, plan, stopped)

    monkeypatch.setattr(loop, "train_step", take)


def crash_of(run: RunFolder, step: int = STEP) -> Path:
    return run.path / "crashes" / f"step-{step:06}"


def crashed(config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> tuple[RunFolder, list[str]]:
    """The run after its failure, and what it said on standard error."""
    assert train(config) == 1
    return tiny.only_run(Path(config.runs_dir)), capfd.readouterr().err.splitlines()
