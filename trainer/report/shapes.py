"""Pictures beside the curves: strips of stages, stacked areas, heat maps, sparklines, and the signs of the verdicts."""

import math
from collections.abc import Sequence
from html import escape

from trainer.report.charts import LABEL_PX, WIDTH, Axis, Line, Scale, curve, frame, grid
from trainer.report.numbers import Points, duration, thin, tick
from trainer.report.verdict import Level

BINS = (0.0, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Lower borders of the heat map's classes: load over the mean load, the middle class being balanced."""
BIN_NAMES = ("none", "below 1/4", "1/4 to 1/2", "1/2 to 0.8", "0.8 to 1.25", "1.25 to 2", "2 to 4", "above 4")

_SIGNS = {
    "good": '<circle cx="8" cy="8" r="7"/><path d="M4.6 8.3 7 10.7 11.4 5.6"/>',
    "look": '<path class="body" d="M8 1 15.4 14.4H.6Z"/><path d="M8 5.6v4.2M8 12v.1"/>',
    "bad": '<path class="body" d="M5 .8h6L15.2 5v6L11 15.2H5L.8 11V5Z"/><path d="M5.4 5.4l5.2 5.2M10.6 5.4 5.4 10.6"/>',
}


def sign(level: Level) -> str:
    """Circle with a tick, triangle with a mark, octagon with a cross: three shapes, not only three colours."""
    return f'<svg class="sign {level}" viewBox="0 0 16 16" role="img" aria-label="{level}">{_SIGNS[level]}</svg>'


def bands(axis: Axis, stages: Sequence[tuple[float, float, str]]) -> str:
    """Stages as labelled stretches of one strip: (from tokens, to tokens, name)."""
    kinds = list(dict.fromkeys(name for _, _, name in stages))
    parts = [
        f'<span class="k{kinds.index(name) % 3}" style="left:{axis.x(first) / WIDTH:.2%};'
        f'width:{(axis.x(last) - axis.x(first)) / WIDTH:.2%}"><em>{escape(name)}</em></span>'
        for first, last, name in stages
    ]
    return f'<div class="plot bands"><div class="y">stage</div><div class="area">{"".join(parts)}</div></div>'


def strip(axis: Axis, name: str, points: Points, height: int = 30) -> str:
    """A low curve with its name at the left and its last value at the right, without numbers at its axis."""
    high = max((value for _, value in points), default=0.0) or 1.0
    scale = Scale(low=0.0, high=1.1 * high, height=height)
    drawing = curve(Line(label=name, points=_stairs(points), colour=6), axis, scale)
    borders = "".join(f"M{axis.x(tokens):.1f} 0V{height}" for tokens, _ in axis.borders)
    last = f'<i class="t6" style="top:50%"><b>{tick(points[-1][1])}</b></i>' if points else ""
    return (
        f'<div class="plot strip" style="--h:{height}px"><div class="y">{escape(name)}</div><div class="area">'
        f'<svg viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="border" d="{borders}"/>{drawing}</svg></div><div class="ends">{last}</div></div>'
    )


def stacked(title: str, axis: Axis, layers: Sequence[tuple[str, Points]], height: int = 168) -> str:
    """Seconds of a step on top of each other; all layers have the same tokens."""
    sums = [0.0] * len(layers[0][1])
    totals = [math.fsum(layer[1][i][1] for layer in layers) for i in range(len(sums))]
    scale = Scale(low=0.0, high=1.05 * max(totals), height=height)
    drawing, labels = [], []
    kept = [i for i, _ in thin([(i, total) for i, total in enumerate(totals)])]
    for colour, (name, points) in enumerate(layers, start=1):
        below = list(sums)
        sums = [base + value for base, (_, value) in zip(sums, points, strict=True)]
        upper = [f"{axis.x(points[int(i)][0]):.1f} {scale.y(sums[int(i)]):.1f}" for i in kept]
        lower = [f"{axis.x(points[int(i)][0]):.1f} {scale.y(below[int(i)]):.1f}" for i in reversed(kept)]
        drawing.append(f'<path class="fill f{colour}" d="M{"L".join(upper + lower)}Z"/>')
        whole = math.fsum(totals)
        labels.append((name, colour, math.fsum(value for _, value in points) / whole))
    shares = "".join(
        f'<i class="t{colour}"><b>{share:.0%}</b> {escape(name)}</i>' for name, colour, share in reversed(labels)
    )
    body = frame("".join(drawing) + grid(axis, scale), axis, scale, f'<div class="list">{shares}</div>', show=duration)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <span>seconds per step; shares of all steps</span>'
        f"</figcaption>{body}</figure>"
    )


def sparkline(points: Points, first: float, last: float, colour: int = 1) -> str:
    """A curve of a table's row, on its own scale."""
    finite = [(tokens, value) for tokens, value in points if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(value for _, value in finite), max(value for _, value in finite)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    scale = Scale(low=low - room, high=high + room, height=22)
    drawing = curve(Line(label="", points=thin(finite, 200), colour=colour), Axis(first=first, last=last), scale)
    return f'<svg class="spark" viewBox="0 0 {WIDTH} 22" preserveAspectRatio="none" aria-hidden="true">{drawing}</svg>'


def heat(rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[str], cell_px: int = 22) -> str:
    """Loads over their mean in classes of colour; experts without any token have a cross.

    rows: (name, one ratio per column). Each class is one path, so that hundreds of experts stay small.
    """
    if not rows:
        return ""
    count, paths = len(rows[0][1]), ["" for _ in BIN_NAMES]
    step, crosses = WIDTH / count, ""
    for i, (_, ratios) in enumerate(rows):
        for j, ratio in enumerate(ratios):
            x, y = j * step, i * cell_px
            paths[_bin(ratio)] += f"M{x:.2f} {y}h{step:.2f}v{cell_px}h-{step:.2f}z"
            if ratio == 0:
                crosses += f"M{x + 0.3 * step:.1f} {y + 0.3 * cell_px:.1f}l{0.4 * step:.1f} {0.4 * cell_px:.1f}"
                crosses += f"m0 -{0.4 * cell_px:.1f}l-{0.4 * step:.1f} {0.4 * cell_px:.1f}"
    drawing = "".join(f'<path class="h{i}" d="{path}"/>' for i, path in enumerate(paths) if path)
    drawing += f'<path class="cross" d="{crosses}"/>' if crosses else ""
    height = len(rows) * cell_px
    fine = " fine" if count > 16 else ""
    named = list(enumerate(rows))[:: math.ceil(LABEL_PX / cell_px)]
    names = "".join(f'<i style="top:{(i + 0.5) * cell_px:.1f}px">{escape(name)}</i>' for i, (name, _) in named)
    every = math.ceil(count / 16)
    below = "".join(f'<i style="left:{(j + 0.5) / count:.2%}">{escape(columns[j])}</i>' for j in range(0, count, every))
    texts = ""
    if count <= 16:
        texts = "".join(
            f'<i class="cell b{_bin(ratio)}" '
            f'style="left:{(j + 0.5) / count:.2%};top:{(i + 0.5) * cell_px:.1f}px">{ratio:.2f}</i>'
            for i, (_, ratios) in enumerate(rows)
            for j, ratio in enumerate(ratios)
        )
    return (
        f'<div class="plot heat{fine}" style="--h:{height}px"><div class="y">{names}</div><div class="area">'
        f'<svg viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" aria-hidden="true">{drawing}</svg>{texts}'
        f'</div><div class="x">{below}</div></div>'
    )


def heat_key() -> str:
    """What the colours of a heat map mean."""
    keys = "".join(f'<span><b class="h{i}"></b>{escape(name)}</span>' for i, name in enumerate(BIN_NAMES))
    return f'<p class="key">{keys}</p>'


def _bin(ratio: float) -> int:
    return 0 if ratio <= 0 else 1 + sum(ratio >= border for border in BINS[1:])


def _stairs(points: Points) -> list[tuple[float, float]]:
    """A value holds from the step before to its own; corners only where it changes."""
    corners: list[tuple[float, float]] = []
    for i, (tokens, value) in enumerate(thin(points, 400)):
        if i and corners[-1][1] != value:
            corners.append((corners[-1][0], value))
        corners.append((tokens, value))
    return corners
