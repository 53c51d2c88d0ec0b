"""Which curves the page shows: each chart with the metrics it is made of."""

import math
from collections.abc import Sequence
from dataclasses import replace

from trainer.report.charts import Axis, Chart, Line, figure
from trainer.report.lines import STAGE_NAMES, smoothed
from trainer.report.numbers import Points, percent
from trainer.report.read import Run
from trainer.report.shapes import bands, stacked, strip

STEP_PARTS = ("wait", "forward", "backward", "reduce", "update", "save")
"""What a step's seconds are split into; the rest is shown as such."""


def schedule_strips(run: Run, axis: Axis) -> str:
    """Stages of attention, rate and tokens per step as strips below the curves."""
    stages: list[tuple[float, float, str]] = []
    begin = axis.first
    for row in run.rows:
        name = str(row.get("schedule/attention", ""))
        name = STAGE_NAMES.get(name, name)
        if stages and stages[-1][2] == name:
            stages[-1] = (stages[-1][0], row["tokens"], name)
        else:
            stages.append((begin, row["tokens"], name))
        begin = row["tokens"]
    batch = [
        (row["tokens"], row["schedule/rows"] * row["schedule/row_length"]) for row in run.rows if "schedule/rows" in row
    ]
    strips = [strip(axis, "rate", run.series("schedule/rate")), strip(axis, "batch", batch)]
    return f'<div class="strips">{bands(axis, stages)}{"".join(strips)}</div>'


def learning_charts(run: Run) -> list[Chart]:
    """Losses, bits per byte, sources, the indexer and the balance term."""
    sources = run.below("loss/source/")
    return [
        chart_of_losses(run),
        Chart(
            title="Bits per byte",
            unit="next-token loss per byte of text",
            crop=True,
            lines=[
                *smoothed(run, "training", "loss/bits_per_byte", 1),
                Line(label="held out", points=run.series("validation/bits_per_byte"), colour=2, kind="dots"),
            ],
        ),
        Chart(
            title="MTP loss",
            unit="nats per target",
            crop=True,
            lines=[
                *smoothed(run, "training", "loss/mtp", 1),
                Line(label="held out", points=run.series("validation/mtp_loss"), colour=2, kind="dots"),
            ],
        ),
        Chart(
            title="Loss by source",
            unit="nats per target",
            crop=True,
            lines=[
                line
                for i, name in enumerate(sources[:6] if len(sources) > 1 else [])
                for line in smoothed(run, name.removeprefix("loss/source/"), name, i + 1)
            ],
            note=f"the first 6 of {len(sources)} sources" if len(sources) > 6 else "",
        ),
        Chart(
            title="Indexer loss",
            unit="KL to the dense attention, nats",
            zero=True,
            lines=[
                *smoothed(run, "training", "loss/indexer", 1),
                Line(label="held out", points=run.series("indexer/kl_nats"), colour=2, kind="dots"),
            ],
        ),
        Chart(
            title="Indexer recall",
            unit="share of the dense attention's top-k that it picks",
            lines=_recall(run),
        ),
        Chart(
            title="Balance loss",
            unit="before its weight; 1 is perfect balance",
            lines=smoothed(run, "balance", "loss/balance", 1),
        ),
    ]


def chart_of_losses(run: Run) -> Chart:
    """The first and largest picture: next-token loss in training and held out, and the bar it must clear."""
    bigram = run.ended.get("results", {}).get("bigram/loss")
    return Chart(
        title="Loss",
        unit="nats per target",
        lines=[
            *smoothed(run, "training", "loss/lm", 1),
            Line(label="held out", points=run.series("validation/loss"), colour=2, kind="dots"),
        ],
        levels=[(bigram, f"{bigram:.2f} bigram")] if bigram is not None else [],
        height=280,
        crop=True,
    )


def health_charts(run: Run) -> list[Chart]:
    """Gradients, routing, residual streams, clamps."""
    experts = run.config["model"]["n_routed_experts"]
    low, high = run.series("router/bias_min"), run.series("router/bias_max")
    return [
        Chart(
            title="Gradient norm",
            unit="before clipping",
            lines=smoothed(run, "norm", "optim/grad_norm", 1),
            levels=[(run.config["optim"]["clip_norm"], "clip")] if run.config["optim"].get("clip_norm") else [],
            log=True,
        ),
        Chart(
            title="Fullest expert",
            unit="tokens over the mean, mean of learned layers",
            lines=[
                *smoothed(run, "training", "router/load_max_ratio", 1),
                Line(label="held out", points=run.series("validation/load_max_ratio"), colour=2, kind="dots"),
            ],
            levels=[(1.0, "balanced")],
        ),
        Chart(
            title="Router entropy",
            unit=f"nats, of at most ln {experts}",
            lines=smoothed(run, "entropy", "router/entropy_nats", 1),
            levels=[(math.log(experts), f"{math.log(experts):.2f} uniform")],
        ),
        Chart(
            title="Router bias",
            unit="smallest and largest of the learned layers",
            lines=[Line(label="largest", points=high, colour=2), Line(label="smallest", points=low, colour=1)],
        ),
        Chart(
            title="Dead experts",
            unit="without a token in the step",
            lines=[Line(label="experts", points=run.series("router/dead_experts"), colour=1)],
            zero=True,
        ),
        Chart(
            title="mHC residual mixes",
            unit="distance of row and column sums from 1",
            lines=[
                Line(label="rows", points=run.series("mhc/row_sum_error"), colour=1),
                Line(label="columns", points=run.series("mhc/col_sum_error"), colour=2),
            ],
            log=True,
        ),
        Chart(
            title="mHC composite gain",
            unit="all residual mixes together; doubly stochastic: 1",
            lines=[Line(label="gain", points=run.series("mhc/composite_gain"), colour=1)],
        ),
        Chart(
            title="Clamped activations",
            unit="share of the experts' activations at the clamp",
            lines=[Line(label="clamped", points=run.series("experts/clamped_ratio"), colour=1)],
            zero=True,
            show=percent,
        ),
    ]


def speed_charts(run: Run) -> list[Chart]:
    """Tokens, FLOP and memory."""
    peak, used = run.series("memory/peak_bytes"), run.series("memory/rss_bytes")
    large = max((value for _, value in [*peak, *used]), default=0.0) >= 8 * 2**30
    scale, unit = (2**30, "GiB") if large else (2**20, "MiB")
    fast = (run.last("speed/model_flops_per_s") or 0.0) >= 1e12
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


def figures(charts: Sequence[Chart], axis: Axis) -> list[str]:
    """The charts that have something to show, as HTML."""
    return [html for chart in charts if not is_zero(chart) and (html := figure(chart, axis))]


def is_zero(chart: Chart) -> bool:
    """Whether all it could show is 0, which one word says as well."""
    values = [value for line in chart.lines for _, value in line.points]
    return bool(values) and not any(values)


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


def _recall(run: Run) -> list[Line]:
    """Mean over layers, and each layer thin."""
    rows = [row for row in run.rows if isinstance(row.get("indexer/recall_L"), list)]
    layers = max((len(row["indexer/recall_L"]) for row in rows), default=0)
    lines = []
    for layer in range(layers):
        points = [(row["tokens"], row["indexer/recall_L"][layer]) for row in rows]
        points = [point for point in points if point[1] is not None]
        lines.append(Line(label="", points=points, colour=6, kind="faint", hidden=True))
    several = sum(bool(line.points) for line in lines) > 1
    mean = Line(label="recall", points=run.series("indexer/recall"), colour=2, kind="dots")
    return [*(lines if several else []), mean]
