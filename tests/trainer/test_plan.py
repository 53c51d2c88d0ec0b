"""Proves that a plan is what the run does: its stages and FLOP against a loop over every step of the schedule."""

import subprocess
import sys
from dataclasses import replace

import pytest

from launch.compose import CONFIGS, compose
from model.count import training_flops
from trainer import schedule
from trainer.config import TrainConfig
from trainer.plan import Plan, plan
from trainer.schedule_config import (
    AttentionStage,
    BatchConfig,
    MtpWeightStage,
    RateConfig,
    RowLengthStage,
    ScheduleConfig,
)


@pytest.fixture(scope="module")
def debug() -> TrainConfig:
    return compose(["recipe=debug"]).config


ODD = ScheduleConfig(
    total_tokens=1_000_000,
    rate=RateConfig(peak=1e-3, final=1e-4, warmup_tokens=5_000, decay_start_tokens=700_000),
    batch=BatchConfig(tokens=8_192, start_tokens=4_096, ramp_tokens=100_000),
    row_length=(RowLengthStage(from_tokens=0, value=128), RowLengthStage(from_tokens=300_001, value=512)),
    attention=(
        AttentionStage(from_tokens=0, value="dense"),
        AttentionStage(from_tokens=300_002, value="indexer_warmup"),
        AttentionStage(from_tokens=400_000, value="sparse"),
    ),
    mtp_weight=(
        MtpWeightStage(from_tokens=0, value=0.3),
        MtpWeightStage(from_tokens=777_777, value=0.1),
        MtpWeightStage(from_tokens=2_000_000, value=0.0),
    ),
    indexer_warmup_batch_tokens=1_024,
)
"""Stages that begin inside a step, two of them inside the same one, and one that begins after the last step."""


def check_stages(config: TrainConfig, planned: Plan) -> None:
    steps = schedule.plan(config.schedule)
    flops = tokens = step = 0
    for stage in planned.stages:
        assert stage.first.step == step
        kind = (stage.first.row_length, stage.first.attention, stage.first.mtp_weight)
        for _ in range(stage.steps):
            one = steps[step]
            assert (one.row_length, one.attention, one.mtp_weight) == kind
            flops += one.rows * training_flops(config.model, one.row_length, one.attention).total
            tokens += one.rows * one.row_length
            step += 1
        assert stage.last == steps[step - 1]
        if step < len(steps):
            assert (steps[step].row_length, steps[step].attention, steps[step].mtp_weight) != kind
    assert (planned.steps, planned.tokens, planned.flops) == (len(steps), tokens, flops)
    assert planned.steps == step


def test_stages_add_up_to_every_step(debug: TrainConfig) -> None:
    planned = plan(debug)
    assert {stage.first.attention for stage in planned.stages} == {"dense", "indexer_warmup", "sparse"}
    check_stages(debug, planned)


def test_stages_that_begin_inside_steps(debug: TrainConfig) -> None:
    config = replace(debug, schedule=ODD)
    planned = plan(config)
    assert len(planned.stages) == 4
    check_stages(config, planned)


def test_a_wrong_total_is_noticed(debug: TrainConfig) -> None:
    planned = plan(debug)
    first, *others = planned.stages
    for wrong in (replace(first, flops=first.flops + 1), replace(first, tokens=first.tokens - 1)):
        with pytest.raises(AssertionError):
            check_stages(debug, replace(planned, stages=(wrong, *others)))


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from launch.compose import compose; from trainer.plan import plan; "
        "plan(compose(['recipe=debug']).config); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, check=True, timeout=120)
