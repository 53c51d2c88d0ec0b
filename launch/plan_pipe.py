"""The part of `keel plan` about a pipeline: what each pipe rank has, its bubble, its rows in flight, what it sends."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.plan_units import rounded

if TYPE_CHECKING:
    from trainer.config import ParallelConfig
    from trainer.parallel.simulate import Profile
    from trainer.plan_pipe import Chunk, Pipeline, Played

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


def notes(pipeline: "Pipeline") -> tuple[str, ...]:
    """What the columns mean."""
    times = "as measured" if pipeline.measured else "if passes take what their FLOP say and transfers nothing"
    return (
        "share of FLOP: of a row of the length of most tokens, attention sparse: ranks are balanced for it. bubble: of",
        f"the time, in which a rank waits, {times}. in flight: most rows",
        "between their passes, counted by chunk. streams sent: by such a rank in a step, and gradients of streams",
    )


def read_times(path: str, parallel: "ParallelConfig") -> "Profile":
    """Measured times of a pipeline from a JSON file. Raises ValueError where they are not such."""
    from trainer.parallel.simulate import Profile

    if parallel.pipe == 1:
        raise ValueError(f"--times = {path}: expected a pipeline, parallel.pipe above 1")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--times = {path}: expected a file of JSON ({error})") from None
    times = found if isinstance(found, dict) else {}
    forward, backward, transfer = times.get("forward", []), times.get("backward", []), times.get("transfer", -1)
    good = all(isinstance(of, list) and len(of) == parallel.chunks for of in (forward, backward)) and len(times) == 3
    if not (good and all(map(_is_time, (*forward, *backward, transfer))) and min(*forward, *backward) > 0):
        expected = f"forward and backward, {parallel.chunks} positive numbers each, and transfer, a number from 0 on"
        raise ValueError(f"--times = {path}: expected {expected}")
    return Profile(forward=tuple(forward), backward=tuple(backward), transfer=transfer)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


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
        "measured": pipeline.measured,
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
