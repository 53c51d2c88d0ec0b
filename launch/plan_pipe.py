"""The part of `keel plan` about a pipeline: what each pipe rank has, its bubble, its rows in flight, what it sends."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch.plan_units import rounded

if TYPE_CHECKING:
    from trainer.plan_pipe import Chunk, Pipeline, Played

NOTES = (
    "share of FLOP: of a row of the length of most tokens, attention sparse, for which ranks are balanced. bubble: of",
    "the time, in which a rank waits, if passes take what their FLOP say and transfers nothing. in flight: most rows",
    "between their passes, counted for each chunk. streams sent: by such a rank in a step, and gradients of streams",
)
Row = Sequence[str]


def ranks(pipeline: "Pipeline", stage: int) -> list[Row]:
    """By pipe rank, in a stage of the schedule."""
    played = pipeline.played[stage]
    heading = (f"pipe ranks, {pipeline.schedule}", "layers", "parameters", "share of FLOP", "bubble", "in flight")
    lines: list[Row] = [(*heading, "streams sent")]
    for rank in range(pipeline.ranks):
        own = [chunk for chunk in pipeline.chunks if chunk.rank == rank]
        lines.append(
            (
                f"{rank}",
                " and ".join(_layers(chunk) for chunk in own),
                f"{sum(chunk.parameters for chunk in own):,}",
                f"{100 * pipeline.share_of(rank):.1f} %",
                f"{100 * played.bubbles[rank]:.1f} %",
                f"{played.in_flight[rank]}",
                rounded(played.sent_bytes[rank]),
            )
        )
    return lines


def bubbles(pipeline: "Pipeline") -> list[Row]:
    """By stage of the schedule."""
    played = pipeline.played
    return [
        ("last step of the stage", *(f"stage {number}" for number in range(1, len(played) + 1))),
        ("rows of a column", *(f"{one.rows:,}" for one in played)),
        ("bubble of all ranks", *(f"{100 * one.bubble:.1f} %" for one in played)),
    ]


def as_json(pipeline: "Pipeline") -> dict[str, Any]:
    """All numbers, exact."""
    return {
        "schedule": pipeline.schedule,
        "chunks": [_chunk_json(chunk) for chunk in pipeline.chunks],
        "share_of_rank": [pipeline.share_of(rank) for rank in range(pipeline.ranks)],
        "stages": [_played_json(one) for one in pipeline.played],
    }


def _chunk_json(chunk: "Chunk") -> dict[str, Any]:
    return {
        "rank": chunk.rank,
        "layers": list(chunk.layers),
        "parameters": chunk.parameters,
        "flops": asdict(chunk.passes),
        "share": chunk.share,
    }


def _played_json(played: "Played") -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(played).items()}


def _layers(chunk: "Chunk") -> str:
    first, last = chunk.layers[0], chunk.layers[-1]
    return f"{first}" if first == last else f"{first} to {last}"
