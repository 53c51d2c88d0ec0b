"""What all curves of a page share: the axis of tokens, and the running mean."""

from bisect import bisect_left

from trainer.report.charts import Axis, Line
from trainer.report.numbers import Points, smooth
from trainer.report.read import Run

SMOOTH_FROM, SMOOTH_SHARE = 40, 40
"""Curves of at least so many steps get a mean over a 40th of them (5 steps at least) on top of the single steps."""

STAGE_NAMES = {"indexer_warmup": "warm-up"}


def axis_of(run: Run) -> Axis:
    """From 0 to the last token, with a border where attention or the row length changes and a mark at each restart."""
    borders = []
    for before, row in zip(run.rows, run.rows[1:], strict=False):
        kind = "schedule/attention", "schedule/row_length"
        if any(before.get(key) != row.get(key) for key in kind):
            borders.append((before["tokens"], str(row.get("schedule/attention", ""))))
    tokens_at = {row["step"]: row["tokens"] for row in run.rows}
    resumed = [row["step"] for row in run.history if row.get("event") == "resume"]
    restarts = [tokens_at[step] for step in resumed if step in tokens_at]
    return Axis(first=0, last=max(run.tokens, 1), borders=borders, restarts=restarts)


def smoothed(run: Run, label: str, name: str, colour: int) -> list[Line]:
    """A metric's single steps thin, their running mean thick; few points as they are."""
    points = run.series(name)
    if len(points) < SMOOTH_FROM:
        return [Line(label=label, points=points, colour=colour)]
    return [
        Line(label="", points=points, colour=colour, kind="faint", hidden=True),
        Line(label=label, points=running_mean(run, points), colour=colour),
    ]


def running_mean(run: Run, points: Points) -> list[tuple[float, float]]:
    """The mean over neighbours, never across the border of two stages: a step there is a step, not a slope."""
    borders = [tokens for tokens, _ in axis_of(run).borders]
    stages: list[list[tuple[float, float]]] = [[] for _ in range(len(borders) + 1)]
    for tokens, value in points:
        stages[bisect_left(borders, tokens)].append((tokens, value))
    return [point for stage in stages for point in smooth(stage, span(points))]


def span(points: Points) -> int:
    """How many steps a running mean of these points takes."""
    return max(5, len(points) // SMOOTH_SHARE)
