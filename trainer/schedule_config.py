"""Schedules as data: every value of a run that changes with the tokens seen. `trainer/schedule.py` evaluates them.

Tokens seen = rows x row length of all steps before: an integer that any step number determines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from model.config import AttentionMode, require


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLengthStage:
    """Rows have `value` tokens from `from_tokens` on."""

    from_tokens: int
    value: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionStage:
    """dense: all visible blocks, indexer untrained. indexer_warmup: dense, only the indexer learns. sparse: top-k."""

    from_tokens: int
    value: AttentionMode


@dataclass(frozen=True, kw_only=True, slots=True)
class MtpWeightStage:
    """The MTP loss counts `value` times from `from_tokens` on."""

    from_tokens: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RateConfig:
    """Learning rate: linear warm-up to `peak`, constant, cosine to `final` from `decay_start_tokens` to the end."""

    peak: float
    final: float
    warmup_tokens: int
    decay_start_tokens: int

    def __post_init__(self) -> None:
        require(self.peak > 0, "peak", self.peak, "a positive rate")
        require(0 <= self.final <= self.peak, "final", self.final, f"between 0 and peak={self.peak}")
        require(
            0 <= self.warmup_tokens <= self.decay_start_tokens,
            "warmup_tokens",
            self.warmup_tokens,
            f"between 0 and decay_start_tokens={self.decay_start_tokens}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Tokens per step: linear from `start_tokens` to `tokens` over the first `ramp_tokens`."""

    tokens: int
    start_tokens: int
    ramp_tokens: int = 0

    def __post_init__(self) -> None:
        require(
            0 < self.start_tokens <= self.tokens,
            "start_tokens",
            self.start_tokens,
            f"between 1 and tokens={self.tokens}",
        )
        require(self.ramp_tokens >= 0, "ramp_tokens", self.ramp_tokens, "at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """All schedules of a run, each a table over the tokens seen."""

    total_tokens: int
    rate: RateConfig
    batch: BatchConfig
    row_length: tuple[RowLengthStage, ...]
    attention: tuple[AttentionStage, ...]
    mtp_weight: tuple[MtpWeightStage, ...]
    indexer_warmup_rate: float = 1e-3
    """Rate during `indexer_warmup` (V3.2's value; V4 gives none)."""
    indexer_warmup_batch_tokens: int | None = None
    """Tokens per step during `indexer_warmup`; None: those of `batch`."""

    def __post_init__(self) -> None:
        require(self.total_tokens > 0, "total_tokens", self.total_tokens, "a positive number of tokens")
        require(
            self.rate.decay_start_tokens <= self.total_tokens,
            "rate.decay_start_tokens",
            self.rate.decay_start_tokens,
            f"at most total_tokens={self.total_tokens}",
        )
        for key in ("row_length", "attention", "mtp_weight"):
            starts = [stage.from_tokens for stage in getattr(self, key)]
            _check_starts(key, starts)
        for stage in self.row_length:
            require(
                0 < stage.value <= self.batch.start_tokens,
                "row_length",
                stage.value,
                f"between 1 and batch.start_tokens={self.batch.start_tokens}: a step holds at least one row",
            )
        require(self.indexer_warmup_rate > 0, "indexer_warmup_rate", self.indexer_warmup_rate, "a positive rate")
        longest = max(stage.value for stage in self.row_length)
        require(
            self.indexer_warmup_batch_tokens is None or self.indexer_warmup_batch_tokens >= longest,
            "indexer_warmup_batch_tokens",
            self.indexer_warmup_batch_tokens,
            f"null, or at least {longest}, the longest row: a step holds at least one row",
        )


def _check_starts(key: str, starts: Sequence[int]) -> None:
    ordered = bool(starts) and starts[0] == 0 and all(a < b for a, b in pairwise(starts))
    require(ordered, f"{key}.from_tokens", list(starts), "a first stage at 0, then increasing numbers")
