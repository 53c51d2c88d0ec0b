"""The page of two runs: what their configurations differ in, then their curves over each other and the difference."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

from trainer.leaves import flatten
from trainer.report import curves, speed
from trainer.report.charts import Axis, Chart, Line, figure
from trainer.report.numbers import Points, at, short
from trainer.report.page import document, section, verdict_cards
from trainer.report.read import Run
from trainer.report.verdicts import verdicts

_LOW: dict[str, Any] = {"height": 84, "note": "", "log": False, "zero": False, "crop": False}
"""What a chart of differences is: low, and with 0 inside it."""


def comparison(first: Run, second: Run) -> str:
    """The whole document; A is `first`, B `second`."""
    axis = Axis(first=0, last=max(first.tokens, second.tokens, 1))
    groups = (
        ("Learning", curves.learning_charts),
        ("Health", curves.health_charts),
        ("Speed", lambda run: speed.speed_charts(run, (first, second))),
    )
    body = [
        _header(first, second),
        section("Configuration", differences(first, second)),
        *(section(title, _overlays(make(first), make(second), axis)) for title, make in groups),
        *(section(f"{mark}: {run.name}", verdict_cards(verdicts(run))) for mark, run in (("A", first), ("B", second))),
        f"<footer>Made by <code>keel report</code> on {second.now:%Y-%m-%d at %H:%M %Z}.</footer>",
    ]
    return document(f"{first.name} and {second.name}", "".join(body), axis)


def differences(first: Run, second: Run) -> str:
    """A table of the keys in which the resolved configurations differ."""
    left, right = flatten(first.config), flatten(second.config)
    keys = [key for key in {**left, **right} if left.get(key) != right.get(key) or (key in left) != (key in right)]
    if not keys:
        return "<p>The two configurations are the same.</p>"
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(
            f"<td><code>{escape(json.dumps(side[key], ensure_ascii=False)) if key in side else '(absent)'}</code></td>"
            for side in (left, right)
        )
        + "</tr>"
        for key in keys
    )
    same = len({**left, **right}) - len(keys)
    return (
        f'<table class="diff"><tr><th>key</th><th class="t1">A</th><th class="t2">B</th></tr>{rows}</table>'
        f'<p class="said">The other {same} keys are equal.</p>'
    )


def overlay(left: Chart, right: Chart) -> Chart | None:
    """The curves of a chart of each run in one; None where neither has any. Colours tell the runs apart."""
    lines = []
    for mark, colour, chart in (("A", 1, left), ("B", 2, right)):
        drawn = [line for line in chart.lines if line.points]
        first = next((line.label for line in drawn if line.label), "")
        for line in drawn:
            name = mark if line.label == first else f"{mark} {line.label}"
            lines.append(replace(line, label=name if line.label else "", colour=colour))
    return replace(left, lines=lines, note="", levels=(), height=min(left.height, 200)) if lines else None


def change(left: Chart, right: Chart) -> Chart | None:
    """B minus A for each curve that both charts have; None where there is none."""
    of_left, of_right = ({line.label: line for line in chart.lines if line.label} for chart in (left, right))
    lines = []
    for label in (label for label in of_right if label in of_left):
        moved = difference(of_left[label].points, of_right[label].points)
        if moved:
            name = label if lines else "B − A"
            lines.append(Line(label=name, points=moved, colour=6 if lines else 3, kind=of_right[label].kind))
    return replace(left, title="", unit="", lines=lines, levels=[(0.0, "")], **_LOW) if lines else None


def difference(left: Points, right: Points) -> list[tuple[float, float]]:
    """right minus left at the tokens of `right` that both have, linearly between the points of `left`."""
    left, right = ([p for p in points if math.isfinite(p[1])] for points in (left, right))
    if len(left) < 2 or not right:
        return []
    return [(tokens, value - at(left, tokens)) for tokens, value in right if left[0][0] <= tokens <= left[-1][0]]


def _overlays(left: Sequence[Chart], right: Sequence[Chart], axis: Axis) -> str:
    parts = []
    for one, other in zip(left, right, strict=True):
        both, moved = overlay(one, other), change(one, other)
        if both is not None and not curves.is_zero(both):
            parts.append(f'<div class="pair">{figure(both, axis)}{figure(moved, axis) if moved else ""}</div>')
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def _header(first: Run, second: Run) -> str:
    parts = ""
    for mark, colour, run in (("A", 1, first), ("B", 2, second)):
        facts = (
            run.name,
            run.state,
            f"step {run.step} of {run.total_steps}",
            f"{short(run.tokens)} tokens",
            _losses(run),
        )
        line = " ".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
        parts += f'<p class="lead"><b class="t{colour}">{mark}</b> {line}</p>'
    return f'<h1>{escape(first.name)} <span class="and">and</span> {escape(second.name)}</h1>{parts}'


def _losses(run: Run) -> str:
    held_out = run.last("validation/loss")
    return f"held-out loss {held_out:.3f} nats" if held_out is not None else ""
