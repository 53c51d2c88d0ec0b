"""A pipeline as planned: the chunks and their cost, and its schedule played through in each stage of the run.

The time of a pass is its FLOP (`model.count.depth_flops`), transfers take none, unless measured times are given, which
then are those of every stage. Of many rows a part is played, and each
of the others is taken to last as long as the last of these: the middle of a schedule repeats itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from model.count import DepthFlops, Passes, depth_flops
from model.inventory import released_tensors
from trainer.config import TrainConfig
from trainer.parallel import stages
from trainer.parallel.orders import Order, rank_of_chunk, training_order
from trainer.parallel.simulate import Profile, Run, in_flight, sends, simulate
from trainer.parallel.stages import Part
from trainer.plan_rows import rows_of_column, stream_bytes
from trainer.schedule import StepPlan

MOST_PLAYED, MOST_PER_RANK = 64, 6
"""Rows that are played one by one, in all or for each rank, whatever is more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A contiguous part of the layers. parameters: with embedding, head and MTP branch; share: of the FLOP of a row.

    passes: FLOP of a row of the length that stages are balanced for, attention sparse.
    """

    rank: int
    layers: range
    parameters: int
    passes: Passes
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """The last step of a stage of the schedule, by rank. rows: of a column of ranks.

    in_flight: the most rows, once for each chunk. sent_bytes: of streams and their gradients in the step.
    """

    rows: int
    bubble: float
    bubbles: tuple[float, ...]
    in_flight: tuple[int, ...]
    sent_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """What `keel plan` says of a pipeline. played: by stage of the schedule; by measured times, if there were any."""

    schedule: str
    ranks: int
    measured: bool
    chunks: tuple[Chunk, ...]
    played: tuple[Played, ...]

    def share_of(self, rank: int) -> float:
        """A rank's share of the FLOP of a row; 1 / ranks is even."""
        return sum(chunk.share for chunk in self.chunks if chunk.rank == rank)


def pipeline(
    config: TrainConfig, steps: Sequence[StepPlan], parts: Sequence[Part], measured: Profile | None = None
) -> Pipeline:
    """Of a run on several pipe ranks; steps: the last of each stage; parts: of all ranks. measured: instead of FLOP."""
    made = cache(partial(orders, config))
    return Pipeline(
        schedule=config.parallel.schedule,
        ranks=config.parallel.pipe,
        measured=measured is not None,
        chunks=_chunks(config, parts),
        played=tuple(_play(config, step, parts, measured or profile(config, step, parts), made) for step in steps),
    )


def play(config: TrainConfig, step: StepPlan, rows: int, measured: Profile | None = None) -> Run:
    """The schedule of a column, with so many rows of this step. measured: instead of FLOP."""
    parts = stages.parts(config.parallel, config.model, stages.usual_row(config.schedule))
    return simulate(orders(config, rows), measured or profile(config, step, parts))


def orders(config: TrainConfig, rows: int) -> list[Order]:
    """Of all ranks of a column that takes so many rows."""
    parallel = config.parallel
    return [training_order(parallel.schedule, parallel.pipe, rank, rows) for rank in range(parallel.pipe)]


def profile(config: TrainConfig, step: StepPlan, parts: Sequence[Part]) -> Profile:
    """FLOP of a row of this step through each chunk, with those of layers that are computed again (recompute=[block]).

    Of layers of which only parts are computed again, this is not counted.
    """
    flops = depth_flops(config.model, step.row_length, step.attention)
    if "block" in config.recompute:
        # The MTP branch is not: it is in the end.
        layers = tuple(replace(one, backward=one.backward + one.forward * bool(one.backward)) for one in flops.layers)
        flops = replace(flops, layers=layers)
    passes = _passes(flops, parts)
    return Profile(forward=tuple(one.forward for one in passes), backward=tuple(one.backward for one in passes))


def _passes(flops: DepthFlops, parts: Sequence[Part]) -> list[Passes]:
    """By chunk."""
    nothing = Passes(forward=0, backward=0)
    layers = dict(chunk for part in parts for chunk in zip(part.chunks, part.layers, strict=True))
    found = [sum((flops.layers[layer] for layer in layers[number]), nothing) for number in sorted(layers)]
    return [*found[:-1], found[-1] + flops.end]


def _chunks(config: TrainConfig, parts: Sequence[Part]) -> tuple[Chunk, ...]:
    passes = _passes(depth_flops(config.model, stages.usual_row(config.schedule), "sparse"), parts)
    whole = sum(one.total for one in passes)
    alone = [
        (number, replace(part, chunks=(number,), layers=(layers,)))
        for part in parts
        for number, layers in zip(part.chunks, part.layers, strict=True)
    ]
    return tuple(
        Chunk(
            rank=rank_of_chunk(len(parts), number),
            layers=chunk.layers[0],
            parameters=_parameters(config, chunk, tied=len(alone) == len(parts)),
            passes=passes[number],
            share=passes[number].total / whole,
        )
        for number, chunk in sorted(alone, key=lambda one: one[0])
    )


def _parameters(config: TrainConfig, chunk: Part, *, tied: bool) -> int:
    """tied: the last chunk has an embedding of its own, for the first one is on another rank."""
    return sum(
        spec.size * (config.model.n_routed_experts if spec.group == "experts" else 1)
        for spec in released_tensors(config.model, experts=1)
        if spec.kind != "buffer" and (chunk.holds(spec.name) if tied else chunk.uses(spec.name))
    )


def _play(
    config: TrainConfig, step: StepPlan, parts: Sequence[Part], costs: Profile, made: Callable[[int], list[Order]]
) -> Played:
    """made: the orders for so many rows."""
    rows, most = rows_of_column(config, step), max(MOST_PLAYED, MOST_PER_RANK * config.parallel.pipe)
    size, of = stream_bytes(config, step.row_length), made(min(rows, most))
    end = simulate(of, costs).end
    if rows > most:
        end += (rows - most) * (end - simulate(made(most - 1), costs).end)
    busy = [rows * sum(costs.forward[chunk] + costs.backward[chunk] for chunk in part.chunks) / end for part in parts]
    return Played(
        rows=rows,
        bubble=1 - sum(busy) / len(busy),
        bubbles=tuple(1 - share for share in busy),
        in_flight=tuple(map(in_flight, of)),
        sent_bytes=tuple(sends(order).total() * rows // min(rows, most) * size for order in of),
    )
