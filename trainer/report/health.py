"""Is it healthy? Gradients, routing, residual streams, clamps and memory, each against a named limit."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from trainer.report.numbers import count, percent, short, size
from trainer.report.read import Run
from trainer.report.verdict import Level, Reason, Verdict, above, judge

CLIP_SCALE_LOOK = 0.5
"""Mean factor of the clip over the last steps: below it the clip, not the rate, sets the size of a step."""

NORM_LOOK, NORM_BAD = 10.0, 100.0
"""The largest gradient norm of the last steps over their median."""

SPIKE_LOOK_NATS, SPIKE_LOOK_SPREADS = 0.5, 5.0
"""A step's loss above the median of the steps around it: both in nats and in their median distance from it."""

DEAD_BAD = 0.25
"""Share of experts that no token of a step went to; one alone is worth a look."""

LOAD_LOOK, LOAD_BAD = 2.0, 8.0
"""Tokens of the fullest expert over the mean. Also bad, in a small model: LOAD_WHOLE of what can be reached at all."""
LOAD_WHOLE = 0.9

COLUMN_LOOK, COLUMN_BAD = 1e-3, 1e-1
"""How far a column sum of a residual mix is from 1. Sinkhorn divides by them last: only eps and rounding are left."""

ROW_LOOK, ROW_BAD = 0.1, 1.0
"""The same of a row sum. Rows only converge, the slower the sharper the mix: 20 rounds leave 0.084 of the sharpest.
Above that, rounds are missing; at 1 a stream's gradient counts twice. What it costs over all sites is the gain."""

GAIN_LOOK, GAIN_BAD = 2.0, 10.0
"""Largest gain of the residual mixes of all layers together; doubly stochastic ones have 1."""

CLAMPED_LOOK, CLAMPED_BAD = 0.01, 0.1
"""Share of expert activations that meet the clamp: a guard against outliers, not a part of the function."""

GROWTH_LOOK = 1.2
"""Memory of the process now over that in the middle of the steps with the same rows."""


def healthy(run: Run) -> Verdict:
    """The verdict from a run's rows; gradients are judged within the last stage of attention, which sets their size."""
    rows = run.window()
    stage = [row for row in rows if row.get("schedule/attention") == rows[-1].get("schedule/attention")]
    return judge(
        "healthy",
        [
            not_finite(rows),
            clipped([float(row["optim/clip_scale"]) for row in stage if "optim/clip_scale" in row]),
            gradient_spikes([float(row["optim/grad_norm"]) for row in stage if "optim/grad_norm" in row]),
            loss_spikes([float(row["loss/lm"]) for row in stage if "loss/lm" in row]),
            _dead(run),
            _load(run, rows),
            *_streams(run),
            clamped(run.last("experts/clamped_ratio")),
            memory_growth(run.rows),
        ],
    )


def not_finite(rows: Sequence[Mapping[str, Any]]) -> Reason | None:
    """Metrics that are NaN or infinite in the last steps."""
    names = sorted({name for row in rows for name, value in row.items() if value in ("NaN", "Infinity", "-Infinity")})
    return (
        Reason(level="bad", text=f"not a number in the last {len(rows)} steps: {', '.join(names)}") if names else None
    )


def clipped(scales: Sequence[float]) -> Reason | None:
    """How often the clip made the gradient smaller, and by how much in the mean."""
    if not scales:
        return None
    share, mean = sum(scale < 1 for scale in scales) / len(scales), fmean(scales)
    by = f", to {percent(mean)} of its norm in the mean" if share else ""
    text = f"gradient clipped in {percent(share)} of the last {len(scales)} steps{by}"
    return Reason(level="good" if mean >= CLIP_SCALE_LOOK else "look", text=text)


def gradient_spikes(norms: Sequence[float]) -> Reason | None:
    """The largest norm against the median."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    if len(finite) < 4 or median(finite) == 0:
        return None
    ratio = max(finite) / median(finite)
    text = f"gradient norm {short(finite[-1])}, at most {short(ratio, 2)} times its median"
    return Reason(level=above(ratio, NORM_LOOK, NORM_BAD), text=text)


def loss_spikes(losses: Sequence[float], reach: int = 8) -> Reason | None:
    """Steps whose loss stands out above the `reach` steps on either side."""
    spikes = 0
    for i, loss in enumerate(losses):
        around = [other for other in losses[max(0, i - reach) : i + reach + 1] if math.isfinite(other)]
        middle = median(around or [loss])
        spread = median(abs(other - middle) for other in around or [loss])
        spikes += loss - middle > max(SPIKE_LOOK_NATS, SPIKE_LOOK_SPREADS * spread)
    text = f"{spikes} of the last {len(losses)} steps with a loss {SPIKE_LOOK_NATS} nats above its neighbours"
    return Reason(level="look", text=text) if spikes else None


def dead_experts(dead: float, experts: int) -> Reason:
    """Experts that no token of the last measured step went to."""
    level: Level = "good" if dead == 0 else above(dead / experts, 0, DEAD_BAD)
    return Reason(level=level, text=f"dead experts {count(dead)} of {count(experts)}")


def load(ratios: Sequence[float], experts: int, chosen: int) -> Reason:
    """The mean of the fullest expert's load over the mean load; one expert can have at most experts / chosen."""
    ratio = fmean(ratios)
    most = experts / chosen
    level: Level = "bad" if ratio > LOAD_WHOLE * most else above(ratio, LOAD_LOOK, LOAD_BAD)
    return Reason(level=level, text=f"the fullest expert has {ratio:.2f} times the mean load")


def column_sums(error: float) -> Reason:
    """Whether Sinkhorn ended with the columns of the residual mixes."""
    return Reason(level=above(error, COLUMN_LOOK, COLUMN_BAD), text=f"mHC column sums within {short(error, 2)} of 1")


def row_sums(error: float) -> Reason:
    """How far Sinkhorn's rounds have brought the rows of the residual mixes."""
    return Reason(level=above(error, ROW_LOOK, ROW_BAD), text=f"mHC row sums within {short(error, 2)} of 1")


def gain(value: float) -> Reason:
    """The most that all residual mixes together amplify, forwards or backwards."""
    return Reason(level=above(value, GAIN_LOOK, GAIN_BAD), text=f"gain of all residual mixes together {value:.2f}")


def clamped(share: float | None) -> Reason | None:
    """Share of expert activations at the clamp."""
    if share is None:
        return None
    return Reason(level=above(share, CLAMPED_LOOK, CLAMPED_BAD), text=f"{percent(share)} of expert activations clamped")


def memory_growth(rows: Sequence[Mapping[str, Any]]) -> Reason | None:
    """Memory of the process against half as many steps ago, among steps with the same rows; None without growth."""
    measured = [row for row in rows if "memory/rss_bytes" in row]
    shape = ("schedule/rows", "schedule/row_length", "schedule/attention")
    same = [row for row in measured if [row.get(key) for key in shape] == [measured[-1].get(key) for key in shape]]
    if len(same) < 8:
        return None
    before, after = same[len(same) // 2]["memory/rss_bytes"], same[-1]["memory/rss_bytes"]
    text = f"memory grew from {size(before)} to {size(after)} over the last {len(same) - len(same) // 2} such steps"
    return Reason(level="look", text=text) if after > GROWTH_LOOK * before else None


def _dead(run: Run) -> Reason | None:
    dead, model = run.last("router/dead_experts"), run.config["model"]
    if dead is None:
        return None
    layers = model["num_hidden_layers"] + model.get("num_nextn_predict_layers", 0) - model.get("num_hash_layers", 0)
    return dead_experts(dead, layers * model["n_routed_experts"])


def _load(run: Run, rows: Sequence[Mapping[str, Any]]) -> Reason | None:
    ratios = [float(row["router/load_max_ratio"]) for row in rows if "router/load_max_ratio" in row]
    model = run.config["model"]
    return load(ratios, model["n_routed_experts"], model["num_experts_per_tok"]) if ratios else None


def _streams(run: Run) -> list[Reason | None]:
    row, column = run.last("mhc/row_sum_error"), run.last("mhc/col_sum_error")
    gains = [run.last(f"mhc/composite_gain{way}") for way in ("", "_backward")]
    known = [value for value in gains if value is not None]
    return [
        row_sums(row) if row is not None else None,
        column_sums(column) if column is not None else None,
        gain(max(known)) if known else None,
    ]
