"""The page of one run: one HTML file with everything in it, which needs no network and no script."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from trainer.report import curves, speed, tables
from trainer.report.charts import Axis, figure
from trainer.report.lines import SMOOTH_FROM, axis_of, span
from trainer.report.numbers import count, duration, short
from trainer.report.read import Run
from trainer.report.schedule import sessions
from trainer.report.shapes import sign
from trainer.report.verdict import Verdict
from trainer.report.verdicts import verdicts

OPTIONAL = {
    "validation/loss": "held-out loss",
    "loss/bits_per_byte": "bits per byte",
    "loss/source/": "loss by source",
    "time/forward_s": "the parts of a step's time",
    "speed/utilisation": "utilisation",
    "memory/rss_bytes": "memory",
    "optim/weight_rms/": "weights by group",
    "router/load_LE": "load by expert",
    "router/bias_max": "router bias",
    "mhc/row_sum_error": "residual mixes",
    "experts/clamped_ratio": "clamped activations",
    "indexer/recall": "indexer recall",
}
"""What a run may not have measured, and what the page says it lacks then."""


def page(run: Run) -> str:
    """The whole document."""
    axis = axis_of(run)
    body = [
        header(run),
        verdict_cards(verdicts(run)),
        *(_curves(run, axis) if run.rows else ["<p>No step has been measured yet.</p>"]),
        section("Samples", tables.samples(run)),
        section("Configuration", tables.configuration(run)),
        section("Provenance", tables.provenance(run)),
        f"<footer>{escape(lacks(run))}Made by <code>keel report</code> on {run.now:%Y-%m-%d at %H:%M %Z}.</footer>",
    ]
    return document(run.name, "".join(body), axis)


def document(title: str, body: str, axis: Axis) -> str:
    """Head, style and read-outs around a body."""
    style, script = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n"
        f'<body data-first="{axis.first:.0f}" data-last="{axis.last:.0f}">{body}\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def header(run: Run) -> str:
    """Name, state and what it ran on."""
    facts = run.provenance
    spent = sum(session.kept_s for session in sessions(run))
    parts = [
        run.state,
        f"step {run.step} of {run.total_steps}",
        f"{short(run.tokens)} of {short(run.total_tokens)} tokens",
        duration(spent) if spent else "",
        ", ".join(filter(None, (facts.get("device_name") or facts["device"], facts.get("dtype"))))
        if facts.get("device")
        else "",
        f"torch {facts['torch']}" if facts.get("torch") else "",
        f"commit {str(facts['commit'])[:8]}{' with changes' if facts.get('dirty') else ''}"
        if facts.get("commit")
        else "",
    ]
    line = " ".join(f"<span>{escape(part)}</span>" for part in parts if part)
    return f'<h1>{escape(run.name)}</h1><p class="lead">{line}</p>'


def verdict_cards(found: Sequence[Verdict]) -> str:
    """Question, level in word and sign, reasons; the gravest first."""
    return f'<section class="verdicts">{"".join(map(_card, found))}</section>'


def section(title: str, content: str) -> str:
    """A headed part of the page; nothing where it has no content."""
    return f'<section id="{escape(title.lower())}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def lacks(run: Run) -> str:
    """One sentence naming what was not measured, or nothing."""
    names = {name for row in run.rows for name in row}
    missing = [words for start, words in OPTIONAL.items() if not any(name.startswith(start) for name in names)]
    return f"Not measured in this run: {', '.join(missing)}. " if missing and run.rows else ""


def _curves(run: Run, axis: Axis) -> list[str]:
    losses, *learning = curves.learning_charts(run)
    health, rates = curves.health_charts(run), speed.speed_charts(run)
    hero = f'<div class="wide">{figure(losses, axis)}{curves.schedule_strips(run, axis)}</div>'
    zero = [chart.title for chart in (*learning, *health, *rates) if curves.is_zero(chart)]
    said = f'<p class="said">Zero in every step: {escape(", ".join(zero).lower())}.</p>' if zero else ""
    return [
        section("Learning", _marks(run, axis) + _grid([hero, *curves.figures(learning, axis)])),
        section(
            "Health",
            _grid([*curves.figures(health, axis), tables.expert_load(run), tables.groups_table(run, axis)]) + said,
        ),
        section("Speed", _grid([*curves.figures(rates, axis), speed.step_time(run, axis)])),
    ]


def _grid(parts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(parts)}</div>' if any(parts) else ""


def _marks(run: Run, axis: Axis) -> str:
    """What the lines of all charts mean."""
    training, restarts = run.series("loss/lm"), len(axis.restarts)
    marks = ["Everything is drawn against tokens seen"]
    marks += [f"thin: single steps, thick: mean of {span(training)}"] if len(training) >= SMOOTH_FROM else []
    marks += ["dots: held-out rows, the same each time"] if run.series("validation/loss") else []
    marks += ["dotted: a stage begins"] if axis.borders else []
    marks += [f"dashed: {'a restart' if restarts == 1 else f'{count(restarts)} restarts'}"] if restarts else []
    return f'<p class="said">{"; ".join(marks)}.</p>'


def _card(verdict: Verdict) -> str:
    reasons = "".join(
        f'<li class="{reason.level}">{sign(reason.level) if reason.level != "good" else ""}{escape(reason.text)}</li>'
        for reason in verdict.reasons
    )
    return (
        f'<article class="verdict {verdict.level}"><h3>{sign(verdict.level)}{escape(verdict.question)}'
        f"<em>{verdict.level}</em></h3><ul>{reasons}</ul></article>"
    )
