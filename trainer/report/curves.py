"""Which curves the page shows: each chart with the metrics it is made of."""

import math
from collections.abc import Sequence

from trainer.report.charts import Axis, Chart, Line, figure
from trainer.report.lines import STAGE_NAMES, smoothed
from trainer.report.numbers import percent, short
from trainer.report.read import Run
from trainer.report.shapes import bands, strip


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
            lines=_both(run, "loss/bits_per_byte", "validation/bits_per_byte"),
        ),
        Chart(
            title="MTP loss",
            unit="nats per target",
            crop=True,
            lines=_both(run, "loss/mtp", "validation/mtp_loss"),
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
            lines=_both(run, "loss/indexer", "indexer/kl_nats"),
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
        lines=_both(run, "loss/lm", "validation/loss"),
        levels=[(bigram, f"{bigram:.2f} bigram")] if bigram is not None else [],
        height=280,
        crop=True,
    )


def health_charts(run: Run) -> list[Chart]:
    """Gradients, routing, residual streams, clamps."""
    return [
        Chart(
            title="Gradient norm",
            unit="before clipping",
            lines=smoothed(run, "norm", "optim/grad_norm", 1),
            levels=[(run.config["optim"]["clip_norm"], "clip")] if run.config["optim"].get("clip_norm") else [],
            log=True,
        ),
        *_routing_charts(run),
        Chart(
            title="mHC residual mixes",
            unit="distance of row and column sums from 1",
            show=lambda value: short(value, 2),
            lines=[
                Line(label="rows", points=run.series("mhc/row_sum_error"), colour=1),
                Line(label="columns", points=run.series("mhc/col_sum_error"), colour=2),
            ],
            log=True,
        ),
        Chart(
            title="mHC composite gain",
            unit="all residual mixes together; doubly stochastic: 1",
            least=0.1,
            lines=[
                Line(label="forward", points=run.series("mhc/composite_gain"), colour=1),
                Line(label="backward", points=run.series("mhc/composite_gain_backward"), colour=2),
            ],
        ),
        Chart(
            title="Clamped activations",
            unit="share of the experts' activations at the clamp",
            lines=[Line(label="clamped", points=run.series("experts/clamped_ratio"), colour=1)],
            zero=True,
            show=percent,
        ),
    ]


def figures(charts: Sequence[Chart], axis: Axis) -> list[str]:
    """The charts that have something to show, as HTML."""
    return [html for chart in charts if not is_zero(chart) and (html := figure(chart, axis))]


def is_zero(chart: Chart) -> bool:
    """Whether all it could show is 0, which one word says as well."""
    values = [value for line in chart.lines for _, value in line.points]
    return bool(values) and not any(values)


def _both(run: Run, training: str, held_out: str) -> list[Line]:
    """A metric of the steps, and the same on held-out rows as dots."""
    dots = Line(label="held out", points=run.series(held_out), colour=2, kind="dots")
    return [*smoothed(run, "training", training, 1), dots]


def _routing_charts(run: Run) -> list[Chart]:
    experts = run.config["model"]["n_routed_experts"]
    low, high = run.series("router/bias_min"), run.series("router/bias_max")
    return [
        Chart(
            title="Fullest expert",
            unit="tokens over the mean, mean of learned layers",
            lines=_both(run, "router/load_max_ratio", "validation/load_max_ratio"),
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
    ]


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
