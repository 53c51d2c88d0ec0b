"""What a run will be, from its configuration alone: parameters, schedule by stage, FLOP, layout and memory, decoding.

Nothing is allocated and torch is not imported. FLOP take every row for one document (`model.count.training_flops`), so
they are an upper bound for packed rows, by the little that windows and blocks cost.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from model.config import AttentionMode, ModelConfig
from model.count import Counts, RowFlops, parameters, rule_of_thumb, training_flops
from model.count_decode import cache_bytes
from model.efficiency import Cost, contexts, v4_cost, v32_cost
from model.inventory import TensorSpec, file_tensors, released_tensors
from trainer import schedule
from trainer.config import TrainConfig
from trainer.parallel.simulate import Profile
from trainer.plan_codes import note
from trainer.plan_memory import DTYPE_BYTES
from trainer.plan_parallel import Layout, layout
from trainer.precision.config import Precision
from trainer.precision.recipe import Recipe
from trainer.precision.table import render
from trainer.schedule import StepPlan
from trainer.schedule_config import ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of the run with one row length, attention mode and MTP weight; `last` is its last step.

    row_flops: forward and backward of one row, by part. flops: of all its rows.
    """

    first: StepPlan
    last: StepPlan
    row_flops: RowFlops
    tokens: int
    flops: int

    @property
    def steps(self) -> int:
        return self.last.step - self.first.step + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """The checkpoint in the released format: tensors, scales included, and their bytes."""

    tensors: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """The last token of a row of `cost.context` tokens, as served (`model.efficiency`), beside DeepSeek-V3.2's.

    own_cache_bytes: what `model.cache` holds of the row in the run's type.
    """

    cost: Cost
    reference: Cost
    own_cache_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything `keel plan` prints. precision: which parameters have which formats, as a table, "" where none has."""

    name: str
    counts: Counts
    release: Release
    stages: tuple[Stage, ...]
    layout: Layout
    dtype: Precision
    precision: str
    rule_of_thumb_flops: int
    decoding: tuple[Decoding, ...]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding included; the last step may go past schedule.total_tokens."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)


def plan(config: TrainConfig, measured: Profile | None = None) -> Plan:
    """The plan of a run. measured: see `layout`. Raises nothing that TrainConfig does not raise."""
    stages = tuple(_stages(config))
    tokens = sum(stage.tokens for stage in stages)
    return Plan(
        name=config.name,
        counts=parameters(config.model),
        release=_release(config.model),
        stages=stages,
        layout=layout(config, [stage.last for stage in stages], measured),
        dtype=config.precision.dtype,
        precision=_precision(config),
        rule_of_thumb_flops=rule_of_thumb(config.model, tokens),
        decoding=tuple(_decoding(config.model, DTYPE_BYTES[config.precision.dtype])),
    )


def _precision(config: TrainConfig) -> str:
    """The table of formats and what is counted of codes; "" where nothing has a format."""
    if Recipe(config.precision, config.model).is_plain:
        return ""
    table = render(config.precision, config.model, DTYPE_BYTES[config.precision.dtype])
    return "\n".join(filter(None, (table, note(config))))


def _decoding(config: ModelConfig, element_bytes: int) -> Iterator[Decoding]:
    for context in contexts(config):
        yield Decoding(
            cost=v4_cost(config, context),
            reference=v32_cost(context),
            own_cache_bytes=cache_bytes(config, context, "sparse", element_bytes).total,
        )


def _stages(config: TrainConfig) -> Iterator[Stage]:
    steps = schedule.plan(config.schedule)
    borders = [*_first_steps(config.schedule, steps), len(steps)]
    for begin, end in pairwise(borders):
        first, last = steps[begin], steps[end - 1]
        mode: AttentionMode = first.attention
        row_flops = training_flops(config.model, first.row_length, mode)
        tokens = last.tokens + last.rows * last.row_length - first.tokens
        yield Stage(
            first=first,
            last=last,
            row_flops=row_flops,
            tokens=tokens,
            flops=tokens // first.row_length * row_flops.total,
        )


def _first_steps(config: ScheduleConfig, steps: Sequence[StepPlan]) -> list[int]:
    """The steps at which row length, attention mode or MTP weight change, the first step included."""
    starts = {
        stage.from_tokens for table in (config.row_length, config.attention, config.mtp_weight) for stage in table
    }
    first = {bisect_left(range(len(steps)), start, key=lambda step: steps[step].tokens) for start in starts}
    return sorted(first - {len(steps)})


def _tensors(config: ModelConfig) -> Iterator[tuple[TensorSpec, int]]:
    """Every kind of tensor and how often it occurs: a layer's routed experts are all alike."""
    for spec in released_tensors(config, experts=1):
        yield spec, config.n_routed_experts if spec.group == "experts" else 1


def _release(config: ModelConfig) -> Release:
    tensors = size_bytes = 0
    for spec, copies in _tensors(config):
        files = file_tensors(spec)
        tensors += copies * len(files)
        size_bytes += copies * sum(file.size_bytes for file in files)
    return Release(tensors=tensors, size_bytes=size_bytes)
