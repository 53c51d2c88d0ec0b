"""TrainConfig: everything a run is made of. Checks that need two packages live here and only here."""

import re
from dataclasses import dataclass, field
from typing import Literal

from data.config import DataConfig
from model.config import CSA_RATIO, InitConfig, ModelConfig, require
from optim.config import OptimConfig
from trainer import schedule
from trainer.parallel.mesh import Mesh, largest_divisor
from trainer.precision.config import PrecisionConfig
from trainer.precision.recipe import Recipe
from trainer.schedule_config import ScheduleConfig

VECTOR = 32
"""Numbers that elementwise code takes at a time (two vectors of AVX-512); a chunk's rest it computes by other code.

Measured: SwiGLU of the last 16 of 48 columns differed in 10 of 60 chunks from that of the same rows in a longer chunk.
"""
Recomputed = Literal["attention", "experts", "block"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the auxiliary losses and of the bias rule (R 4.2.2, spec 4.3 and 6)."""

    balance_weight: float = 1e-4
    bias_update_speed: float = 1e-3
    indexer_weight: float = 1.0
    """Weight of the indexer's KL term (ours: V4 gives none; it trains nothing but the indexer)."""

    def __post_init__(self) -> None:
        for key in ("balance_weight", "bias_update_speed", "indexer_weight"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 100
    keep_last: int = 3
    keep_every_steps: int = 0
    """Checkpoints at multiples of this are never deleted; 0 keeps none beyond `keep_last`."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "every_steps", self.every_steps, "a positive number of steps")
        require(self.keep_last >= 2, "keep_last", self.keep_last, "at least 2, so that a torn one has a predecessor")
        require(self.keep_every_steps >= 0, "keep_every_steps", self.keep_every_steps, "at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The layout: ranks per axis (trainer/parallel/mesh.py), and how what they computed is brought together.

    On the exact path no bit of a run depends on the sizes; the fast path sums in the order of the layout.
    """

    pipe: int = 1
    """Ranks that share out the layers and hand each other the streams, forwards and backwards."""
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """The order of forward and backward passes on pipe ranks (trainer/parallel/orders.py)."""
    stages: tuple[int, ...] = ()
    """Layers of each chunk of the pipeline, in order; none: balanced by counted cost (trainer/parallel/stages.py)."""
    stream: Literal["model", "bf16"] = "model"
    """What the streams travel in between pipe ranks: as they are, or, on the fast path only, rounded to bf16."""
    data: int = 1
    expert: int = 1
    """Ranks that share out the experts of a layer and exchange tokens; divides `data`."""
    context: int = 1
    reduction: Literal["exact", "fast"] = "exact"
    dense_reduction: Literal["fp32", "bf16"] = "fp32"
    """What gradients outside the experts travel in on the fast path; those of experts travel in bf16 (R 3.4.1)."""
    owners_limit: int = 64
    """Most data ranks that share out the dense matrices (R 3.4.1 caps the group; the number is ours)."""
    check_every_steps: int = 50
    """How often replicas compare checksums of weights and owners those of their state; 0 never (ours)."""

    def __post_init__(self) -> None:
        for key in ("pipe", "data", "expert", "context", "owners_limit"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number of ranks")
        require(self.context == 1, "context", self.context, "1: larger sizes are not there yet")
        require(self.pipe > 1 or self.schedule == "1f1b", "schedule", self.schedule, "1f1b where parallel.pipe=1")
        of_chunks = f"{self.chunks} positive numbers, one for each chunk of the pipeline, or none"
        fits = len(self.stages) == self.chunks and min(self.stages, default=0) > 0
        require(not self.stages or fits, "stages", list(self.stages), of_chunks)
        exact = self.reduction == "exact"
        require(self.stream == "model" or not exact, "stream", self.stream, "model where parallel.reduction=exact")
        require(self.data % self.expert == 0, "expert", self.expert, f"a divisor of parallel.data={self.data}")
        require(self.check_every_steps >= 0, "check_every_steps", self.check_every_steps, "at least 0 (0 never)")

    @property
    def chunks(self) -> int:
        """Parts that the layers are cut into: DualPipeV gives each pipe rank two of them."""
        return self.pipe * (2 if self.schedule == "dualpipev" else 1)

    @property
    def mesh(self) -> Mesh:
        """The mesh of these sizes."""
        owners = largest_divisor(self.data, self.owners_limit)
        return Mesh(pipe=self.pipe, context=self.context, data=self.data, expert=self.expert, owners=owners)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """wandb beside `metrics.jsonl`: auto is online when a key is there, else offline."""

    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    project: str = "keel"


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Held-out loss every so many steps, on the same rows each time."""

    every_steps: int = 50
    rows: int = 32
    bigram: bool = False
    """Fit a bigram model on the whole training split at the end and print its loss beside the model's."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "every_steps", self.every_steps, "a positive number of steps")
        require(self.rows > 0, "rows", self.rows, "a positive number of rows")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObserveConfig:
    """How often a step is watched closely: the load table, the mHC mixes, the clamped share, the size of weights."""

    every_steps: int = 10
    """Also the first step and the last; 0 watches none."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "every_steps", self.every_steps, "at least 0 (0 watches none)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """The text generated at the end of a run and by `keel sample`."""

    prompt: str = ""
    tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        require(self.tokens >= 0, "tokens", self.tokens, "at least 0")
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0 (0 takes the likeliest)")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")


def check_name(name: str) -> None:
    """Raise ValueError for a run's name that cannot be the beginning of a folder's name."""
    expected = "letters, digits, '_', '.' and '-', at most 80, a letter or digit first"
    require(re.fullmatch(r"[A-Za-z0-9][\w.-]{0,79}", name) is not None, "name", name, expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Which steps are profiled, as they are counted in the progress lines: "20..22" or "20"; "" is none."""

    steps: str | int = ""

    def __post_init__(self) -> None:
        first, last = self.range() or (1, 1)
        require(1 <= first <= last, "steps", self.steps, "the first step, from 1 on, before the last")

    def range(self) -> tuple[int, int] | None:
        """First and last step, None where none is profiled."""
        if self.steps == "":
            return None
        match = re.fullmatch(r"(\d{1,18})(?:\.\.(\d{1,18}))?", str(self.steps))
        require(match is not None, "steps", self.steps, "steps such as 20..22 or 20, or nothing")
        assert match is not None
        return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run. Fields that name a group of `configs/` have that group's name."""

    name: str
    seed: int = 1
    runs_dir: str = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 2
    """Rows computed at the same time on a CPU, one core each; the bits of a run do not depend on it."""
    deterministic: bool = True
    recompute: tuple[Recomputed, ...] = ()
    """Parts of each layer whose activations are computed again in the backward pass (trainer/parallel/recompute.py)."""
    restarts: int = 0
    """How often processes that failed are started again, from the last checkpoint (docs/failures.md)."""
    patience_s: float = 0.0
    """How long all ranks may stay where they are before the run has hung; 0: what the run itself has taken says."""
    kernels: Literal["auto", "off", "triton"] = "auto"
    """Triton kernels in place of plain functions; auto: on a GPU, if triton is installed and precision is not fp64."""
    model: ModelConfig
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig
    data: DataConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2^63 - 1")
        require(self.restarts >= 0, "restarts", self.restarts, "at least 0")
        require(self.patience_s >= 0, "patience_s", self.patience_s, "at least 0 seconds (0: as the run itself takes)")
        require(self.threads > 0, "threads", self.threads, "a positive number of threads")
        self._check_rows()
        self._check_vocabulary()
        self._check_sample()
        self._check_profile()
        self._check_parallel()
        Recipe(self.precision, self.model)  # refuses rules that do not fit the model

    def _check_rows(self) -> None:
        for stage in self.schedule.row_length:
            length, limit = stage.value, self.model.max_position_embeddings
            require(length <= limit, "schedule.row_length", length, f"at most model.max_position_embeddings={limit}")
            for ratio in set(self.model.attention_ratios) - {0}:
                kind = "CSA" if ratio == CSA_RATIO else "HCA"
                require(
                    length >= ratio,
                    "schedule.row_length",
                    length,
                    f"rows of at least {ratio} tokens, one {kind} block of model.compress_ratios",
                )

    def _check_vocabulary(self) -> None:
        tokenizer, rows = self.data.tokenizer, self.model.vocab_size
        if tokenizer.kind == "bpe":
            require(
                tokenizer.vocab_size <= rows,
                "data.tokenizer.vocab_size",
                tokenizer.vocab_size,
                f"at most model.vocab_size={rows}",
            )

    def _check_sample(self) -> None:
        """The end of a run is no place for an error: a prompt has at most a token per byte, and bos before it."""
        most = self.model.max_position_embeddings - 1 - len(self.sample.prompt.encode())
        require(
            self.sample.tokens <= most,
            "sample.tokens",
            self.sample.tokens,
            f"at most {most}: with sample.prompt a row of model.max_position_embeddings",
        )

    def _check_profile(self) -> None:
        profiled = self.profile.range()
        if profiled is not None:
            steps = len(schedule.plan(self.schedule))
            require(profiled[1] <= steps, "profile.steps", self.profile.steps, f"steps of the run, which has {steps}")

    def _check_parallel(self) -> None:
        parallel, experts = self.parallel, self.model.n_routed_experts
        expected = f"a divisor of model.n_routed_experts={experts}"
        require(experts % parallel.expert == 0, "parallel.expert", parallel.expert, expected)
        self._check_pipe()
        if parallel.expert > 1 and parallel.reduction == "exact":
            width = self.model.moe_intermediate_size
            expected = f"a multiple of {VECTOR} where experts are shared out: else bits depend on who computes them"
            require(width % VECTOR == 0, "model.moe_intermediate_size", width, expected)
        if parallel.expert > 1 or parallel.pipe > 1 or parallel.reduction == "fast":
            whys = {"ranks exchange tokens": parallel.expert > 1, "stages hand on streams": parallel.pipe > 1}
            why = next((f"{why} row by row" for why, holds in whys.items() if holds), "sums have an order")
            require(self.threads == 1, "threads", self.threads, f"1 with this parallel section: {why}")

    def _check_pipe(self) -> None:
        parallel, layers = self.parallel, self.model.num_hidden_layers
        chunks, given = parallel.chunks, list(parallel.stages)
        require(chunks <= layers, "parallel.pipe", parallel.pipe, f"at most model.num_hidden_layers={layers} chunks")
        expected = f"numbers that add up to model.num_hidden_layers={layers}, not {sum(given)}"
        require(not given or sum(given) == layers, "parallel.stages", given, expected)
        if parallel.schedule == "dualpipev":
            step = schedule.plan(self.schedule).fewest_rows()
            # Without experts to wait for, the ranks that have no row in the last round have one micro-batch less.
            turns = step.rows // parallel.data if parallel.expert == 1 else -(-step.rows // parallel.data)
            expected = (
                f"1f1b, or twice parallel.pipe={parallel.pipe} rows on each of parallel.data={parallel.data} ranks"
            )
            has = f"; step {step.step + 1} has {step.rows} rows in all"
            require(turns >= chunks, "parallel.schedule", parallel.schedule, expected + has)
