"""Every schedule is a pure function of the tokens seen, and the plan of a run is what a naive loop over them gives."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.compose import compose
from trainer import schedule
from trainer.schedule_config import (
    AttentionStage,
    BatchConfig,
    MtpWeightStage,
    RateConfig,
    RowLengthStage,
    ScheduleConfig,
)


def make(
    total: int,
    start: int,
    full: int,
    ramp: int,
    borders: tuple[int, int],
    lengths: tuple[int, int, int],
    warm_up: int | None = None,
) -> ScheduleConfig:
    low, high = sorted(borders)
    stages = [RowLengthStage(from_tokens=at, value=length) for at, length in zip((0, low, high), lengths, strict=True)]
    return ScheduleConfig(
        total_tokens=total,
        rate=RateConfig(peak=1e-2, final=1e-3, warmup_tokens=total // 10, decay_start_tokens=total // 2),
        batch=BatchConfig(tokens=full, start_tokens=start, ramp_tokens=ramp),
        row_length=tuple(stages if 0 < low < high else stages[:1]),
        attention=(
            AttentionStage(from_tokens=0, value="dense"),
            AttentionStage(from_tokens=total // 3, value="indexer_warmup"),
            AttentionStage(from_tokens=total // 2, value="sparse"),
        ),
        mtp_weight=(MtpWeightStage(from_tokens=0, value=0.3), MtpWeightStage(from_tokens=total // 2, value=0.1)),
        indexer_warmup_batch_tokens=warm_up,
    )


def test_the_warm_up_of_the_indexer_may_have_a_batch_of_its_own() -> None:
    config = make(9_000, 90, 300, 5_000, (0, 0), (10, 10, 10))
    of_its_own = replace(config, indexer_warmup_batch_tokens=25)
    plans = schedule.plan(of_its_own)
    assert {one.rows for one in plans if one.attention == "indexer_warmup"} == {2}
    assert {one.rows for one in plans if one.attention == "sparse"} > {30}
    before = [one for one in plans if one.attention == "dense"]
    assert before == schedule.plan(config)[: len(before)]
    for too_small in (0, 9):
        with pytest.raises(
            ValueError, match=f"indexer_warmup_batch_tokens = {too_small}: expected null, or at least 10"
        ):
            replace(config, indexer_warmup_batch_tokens=too_small)


def naive(config: ScheduleConfig) -> list[tuple[int, int, int, int, int]]:
    """(tokens before, rows, row length, segment, first row) of each step, one after the other."""
    steps, tokens, segment, first, length = [], 0, 0, 0, None
    while tokens < config.total_tokens:
        now = [stage.value for stage in config.row_length if stage.from_tokens <= tokens][-1]
        if length not in (None, now):
            segment, first = segment + 1, 0
        length = now
        batch = config.batch
        share = min(1.0, tokens / batch.ramp_tokens) if batch.ramp_tokens else 1.0
        rows = math.floor(batch.start_tokens + (batch.tokens - batch.start_tokens) * share) // length
        mode = [stage.value for stage in config.attention if stage.from_tokens <= tokens][-1]
        if mode == "indexer_warmup" and config.indexer_warmup_batch_tokens is not None:
            rows = config.indexer_warmup_batch_tokens // length
        steps.append((tokens, rows, length, segment, first))
        tokens, first = tokens + rows * length, first + rows
    return steps


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(100, 20_000),
    start=st.integers(64, 128),
    grow=st.integers(0, 200),
    ramp=st.integers(0, 5_000),
    borders=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    lengths=st.permutations((16, 32, 64)),
    warm_up=st.none() | st.integers(64, 300),
)
def test_the_plan_is_the_naive_loop(total, start, grow, ramp, borders, lengths, warm_up) -> None:
    config = make(total, start, start + grow, ramp, borders, tuple(lengths), warm_up)
    plans, expected = schedule.plan(config), naive(config)
    found = [(one.tokens, one.rows, one.row_length, one.segment, one.first_row) for one in plans]
    assert found == expected
    assert [one.step for one in plans] == list(range(len(expected)))
    rows_by_segment: dict[int, int] = {}
    for _, rows, _, segment, _ in expected:
        rows_by_segment[segment] = rows_by_segment.get(segment, 0) + rows
    assert [rows for _, rows in schedule.segments(config)] == list(rows_by_segment.values())
    assert plans.fewest_rows() == min(plans, key=lambda one: one.rows)


def test_the_rate_has_its_shape() -> None:
    config = make(10_000, 100, 100, 0, (0, 0), (10, 10, 10))
    rate = [schedule.rate(config, tokens) for tokens in (0, 500, 1000, 5000, 7500, 10_000, 20_000)]
    # Linear to the peak at 1000, constant to 5000, half way down at 7500, final from the end on.
    assert rate == pytest.approx([0, 5e-3, 1e-2, 1e-2, 5.5e-3, 1e-3, 1e-3], abs=1e-12)
    plans = schedule.plan(config)
    assert plans[0].rate > 0
    assert plans[len(plans) - 1].rate == pytest.approx(1e-3, abs=1e-12)


def test_without_decay_the_rate_stays_at_its_peak() -> None:
    """Decay from the end on, warm-up to the end, a last step that goes past the end: allowed, and no division by 0."""
    config = make(10_001, 100, 100, 0, (0, 0), (10, 10, 10))
    for warm_up in (0, 10_001):
        rate = replace(config.rate, warmup_tokens=warm_up, decay_start_tokens=10_001)
        plans = schedule.plan(replace(config, rate=rate))
        assert plans[len(plans) - 1].tokens + 100 > 10_001
        assert plans[len(plans) - 1].rate == config.rate.peak


def test_stages_switch_where_they_should() -> None:
    config = make(9_000, 90, 90, 0, (0, 0), (10, 10, 10))
    modes = {one.attention: one for one in reversed(list(schedule.plan(config)))}
    assert (modes["dense"].tokens, modes["indexer_warmup"].tokens, modes["sparse"].tokens) == (0, 3060, 4500)
    assert modes["indexer_warmup"].rate == config.indexer_warmup_rate
    assert (modes["dense"].mtp_weight, modes["sparse"].mtp_weight) == (0.3, 0.1)
    with pytest.raises(IndexError):
        schedule.plan(config)[len(schedule.plan(config))]


@pytest.mark.parametrize("recipe", ["flash", "pro"])
def test_the_released_recipes_are_cheap_to_plan_and_warm_up_for_2000_steps(recipe: str) -> None:
    config = compose([f"recipe={recipe}"]).config.schedule
    plans = schedule.plan(config)
    assert 300_000 < len(plans) < 500_000
    assert plans[2000].tokens == config.rate.warmup_tokens
    assert plans[1999].rate == config.rate.peak
    assert plans[1998].rate < config.rate.peak


def test_debug_runs_through_every_stage() -> None:
    config = compose(["recipe=debug"]).config.schedule
    assert {one.attention for one in schedule.plan(config)} == {"dense", "indexer_warmup", "sparse"}
