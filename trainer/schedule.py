"""Schedules evaluated: every value of a step is a pure function of the tokens seen before it (R 4.2.2; spec 6).

`plan` lays the whole run out as a sequence of steps, by stretches of equal steps, so that any step is found at once.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

from model.config import AttentionMode
from trainer.schedule_config import AttentionStage, MtpWeightStage, RowLengthStage, ScheduleConfig

Stage = TypeVar("Stage", RowLengthStage, AttentionStage, MtpWeightStage)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step. step: number from 0. tokens: seen before it. rows: its rows, first_row.. of segment `segment`."""

    step: int
    tokens: int
    rows: int
    row_length: int
    segment: int
    first_row: int
    rate: float
    attention: AttentionMode
    mtp_weight: float


def after(step: StepPlan) -> int:
    """Tokens seen when a step is done."""
    return step.tokens + step.rows * step.row_length


def row_length(config: ScheduleConfig, tokens: int) -> int:
    """Tokens per row of the step that starts after `tokens`."""
    return _stage(config.row_length, tokens).value


def attention(config: ScheduleConfig, tokens: int) -> AttentionMode:
    """Attention mode of the step that starts after `tokens`."""
    return _stage(config.attention, tokens).value


def mtp_weight(config: ScheduleConfig, tokens: int) -> float:
    """Weight of the MTP loss in the step that starts after `tokens`."""
    return _stage(config.mtp_weight, tokens).value


def batch_rows(config: ScheduleConfig, tokens: int) -> int:
    """Rows of the step that starts after `tokens`: its batch, rounded down to whole rows, in exact integers.

    The batch is that of the indexer's warm-up while it lasts, where it has one of its own; else the ramped one.
    """
    batch, warm_up = config.batch, config.indexer_warmup_batch_tokens
    size = batch.tokens
    if warm_up is not None and attention(config, tokens) == "indexer_warmup":
        size = warm_up
    elif tokens < batch.ramp_tokens:
        size = batch.start_tokens + (batch.tokens - batch.start_tokens) * tokens // batch.ramp_tokens
    return size // row_length(config, tokens)


def rate(config: ScheduleConfig, tokens: int) -> float:
    """Learning rate once `tokens` are seen: linear warm-up from 0, constant, cosine to `final` at total_tokens.

    A step uses the rate at the tokens seen after it, so that the first is above 0 and the last is `final`; where the
    decay would start with the end, it is `peak`.
    """
    of, tokens = config.rate, min(tokens, config.total_tokens)
    if tokens < of.warmup_tokens:
        return of.peak * tokens / of.warmup_tokens
    if tokens <= of.decay_start_tokens:
        return of.peak
    done = (tokens - of.decay_start_tokens) / (config.total_tokens - of.decay_start_tokens)
    return of.final + (of.peak - of.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stretch:
    """`count` equal steps from step `step`, which starts after `tokens` at row `first_row` of its segment."""

    step: int
    count: int
    tokens: int
    rows: int
    row_length: int
    segment: int
    first_row: int


class StepPlans(Sequence[StepPlan]):
    """All steps of a run by number."""

    def __init__(self, config: ScheduleConfig) -> None:
        self._config = config
        self._stretches = tuple(_stretches(config))
        self._first = [stretch.step for stretch in self._stretches]

    def __len__(self) -> int:
        last = self._stretches[-1]
        return last.step + last.count

    @overload
    def __getitem__(self, step: int) -> StepPlan: ...
    @overload
    def __getitem__(self, step: slice) -> list[StepPlan]: ...
    def __getitem__(self, step: int | slice) -> StepPlan | list[StepPlan]:
        if isinstance(step, slice):
            return [self[number] for number in range(*step.indices(len(self)))]
        if not 0 <= step < len(self):
            raise IndexError(step)
        stretch = self._stretches[bisect_right(self._first, step) - 1]
        before = step - stretch.step
        size = stretch.rows * stretch.row_length
        tokens = stretch.tokens + before * size
        mode = attention(self._config, tokens)
        warm_up = mode == "indexer_warmup"
        return StepPlan(
            step=step,
            tokens=tokens,
            rows=stretch.rows,
            row_length=stretch.row_length,
            segment=stretch.segment,
            first_row=stretch.first_row + before * stretch.rows,
            rate=self._config.indexer_warmup_rate if warm_up else rate(self._config, tokens + size),
            attention=mode,
            mtp_weight=mtp_weight(self._config, tokens),
        )

    def fewest_rows(self) -> StepPlan:
        """The first step that has as few rows as any."""
        return self[min(self._stretches, key=lambda stretch: stretch.rows).step]

    def segments(self) -> list[tuple[int, int]]:
        """(row length, rows) of each segment of the data stream."""
        last = {stretch.segment: stretch for stretch in self._stretches}
        return [(one.row_length, one.first_row + one.count * one.rows) for one in last.values()]


def plan(config: ScheduleConfig) -> StepPlans:
    """The run, step by step; the last step is the first to reach total_tokens."""
    return StepPlans(config)


def segments(config: ScheduleConfig) -> list[tuple[int, int]]:
    """(row length, rows) of each segment: a stretch of steps with one row length."""
    return plan(config).segments()


def _stage(stages: Sequence[Stage], tokens: int) -> Stage:
    return stages[bisect_right(stages, tokens, key=lambda stage: stage.from_tokens) - 1]


def _stretches(config: ScheduleConfig) -> Iterator[_Stretch]:
    step = tokens = segment = first_row = 0
    length = row_length(config, 0)
    borders = [stage.from_tokens for stage in (*config.row_length, *config.attention)] + [config.total_tokens]
    while tokens < config.total_tokens:
        if row_length(config, tokens) != length:
            length, segment, first_row = row_length(config, tokens), segment + 1, 0
        rows = batch_rows(config, tokens)
        border = min(mark for mark in borders if mark > tokens)
        count = 1 if tokens < config.batch.ramp_tokens else -(-(border - tokens) // (rows * length))
        yield _Stretch(
            step=step, count=count, tokens=tokens, rows=rows, row_length=length, segment=segment, first_row=first_row
        )
        step, tokens, first_row = step + count, tokens + count * rows * length, first_row + count * rows
