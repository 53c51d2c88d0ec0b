"""Which pictures of speed the page shows: tokens, FLOP, memory, and what a step's time went into."""

import math
from collections.abc import Sequence
from dataclasses import replace

from trainer.report.charts import Axis, Chart, Line
from trainer.report.lines import smoothed
from trainer.report.numbers import Points, percent
from trainer.report.read import Run
from trainer.report.shapes import stacked

STEP_PARTS = ("wait", "forward", "backward", "reduce", "pipe", "exchange", "update", "check", "save")
"""What a step's seconds are split into; the rest is shown as such."""


def speed_charts(run: Run, beside: Sequence[Run] = ()) -> list[Chart]:
    """Tokens, FLOP and memory; in the units of the largest number among the runs that are shown together."""
    peak, used = run.series("memory/peak_bytes"), run.series("memory/rss_bytes")
    shown = (run, *beside)
    large = max(one.last("memory/peak_bytes") or 0.0 for one in shown) >= 8 * 2**30
    scale, unit = (2**30, "GiB") if large else (2**20, "MiB")
    fast = max(one.last("speed/model_flops_per_s") or 0.0 for one in shown) >= 1e12
    return [
        Chart(
            title="Speed",
            unit="tokens per second of a step",
            lines=smoothed(run, "tokens/s", "speed/tokens_per_s", 1),
            zero=True,
        ),
        Chart(
            title="Model FLOP/s",
            unit="TFLOP/s, as counted" if fast else "GFLOP/s, as counted",
            lines=[
                replace(line, points=[(tokens, value / (1e12 if fast else 1e9)) for tokens, value in line.points])
                for line in smoothed(run, "FLOP/s", "speed/model_flops_per_s", 1)
            ],
            zero=True,
        ),
        Chart(
            title="Utilisation",
            unit="model FLOP/s over measured FLOP/s of products",
            lines=smoothed(run, "utilisation", "speed/utilisation", 1),
            zero=True,
            show=percent,
        ),
        Chart(
            title="Memory",
            unit=unit,
            lines=[
                Line(label="peak", points=[(tokens, value / scale) for tokens, value in peak], colour=2),
                Line(label="process", points=[(tokens, value / scale) for tokens, value in used], colour=1),
            ],
            zero=True,
        ),
    ]


def step_time(run: Run, axis: Axis) -> str:
    """The seconds of each step, stacked by what they went into; empty text where that was not measured."""
    names = [name for name in STEP_PARTS if any(f"time/{name}_s" in row for row in run.rows)]
    rows = [row for row in run.rows if "time/step_s" in row]
    if not names or not rows:
        return ""
    layers: list[tuple[str, Points]] = []
    for name in names:
        layers.append((name, [(row["tokens"], float(row.get(f"time/{name}_s", 0.0))) for row in rows]))
    inside = [f"time/{name}_s" for name in names if name != "save"]
    rest = [
        (row["tokens"], max(0.0, row["time/step_s"] - math.fsum(row.get(name, 0.0) for name in inside))) for row in rows
    ]
    return stacked("Where a step's time goes", axis, [*layers, ("rest", rest)])
