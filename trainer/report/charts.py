"""Curves against tokens as HTML with inline SVG that needs no script.

The drawing is an SVG stretched to the width it gets, with strokes that keep theirs; all text is HTML beside it, placed
in percent across and in pixels down. So letters keep their size on a telephone, on paper, and can be selected.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from trainer.report.numbers import Points, log_ticks, short, thin, tick, tick_texts, ticks

WIDTH = 1000
"""Units of the SVG's width, whatever it is stretched to."""
CROPPED, CROP_FROM = 0.1, 4.0
"""A picture may leave out the high values of the first tenth of the tokens if the rest is then 4 times as tall."""
LABEL_PX = 14
"""Least distance of two labels beside a chart."""

Kind = Literal["line", "faint", "dots", "dashed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """What all charts of a page share: the tokens from `first` to `last`, stage borders and restarts."""

    first: float
    last: float
    borders: Sequence[tuple[float, str]] = ()
    restarts: Sequence[float] = ()

    def x(self, tokens: float) -> float:
        """Position in SVG units."""
        return WIDTH * (tokens - self.first) / (self.last - self.first)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A curve. label: stands at its end. colour: number in the palette. hidden: kept out of read-outs."""

    label: str
    points: Points
    colour: int = 1
    kind: Kind = "line"
    hidden: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Curves with one unit. levels: horizontal lines with a name. note: words below.

    zero: the axis begins at 0. least: its least range, so that rounding does not look like a course. crop: a high
    beginning that would flatten the rest is left out, and said to be.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    levels: Sequence[tuple[float, str]] = ()
    log: bool = False
    zero: bool = False
    crop: bool = False
    least: float = 0.0
    height: int = 168
    note: str = ""
    show: Callable[[float], str] = field(default=short)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Values to pixels from the top."""

    low: float
    high: float
    height: int
    log: bool = False

    def y(self, value: float) -> float:
        """Pixels from the top, between 0 and the height."""
        low, high, value = (self._inner(one) for one in (self.low, self.high, value))
        return self.height * min(max((high - value) / (high - low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values to be written at the axis."""
        most = max(3, self.height // 30)
        return (log_ticks if self.log else ticks)(self.low, self.high, most)

    def _inner(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value


def figure(chart: Chart, axis: Axis) -> str:
    """A chart with its heading, axes and labels; empty text where it has no finite value."""
    values = [value for line in chart.lines for _, value in line.points if math.isfinite(value)]
    if not values:
        return ""
    shown = cropped(chart, axis) if chart.crop else values
    scale = scale_for([*shown, *(value for value, _ in chart.levels)], chart)
    words = [chart.note, f"the beginning, up to {chart.show(max(values))}, is above the picture"]
    said = "; ".join(words[: 1 + (max(values) > scale.high)]).removeprefix("; ")
    drawing = [grid(axis, scale), *(_level(value, scale) for value, _ in chart.levels)]
    drawing += [curve(line, axis, scale) for line in chart.lines]
    drawing += [_broken(line, axis) for line in chart.lines]
    labels = _labels(chart, scale)
    note = f'<p class="note">{escape(said)}</p>' if said else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b> <span>{escape(chart.unit)}</span></figcaption>'
        f"{frame(''.join(drawing), axis, scale, labels, readout(chart.lines), chart.show)}{note}</figure>"
    )


def frame(
    drawing: str, axis: Axis, scale: Scale, labels: str, data: str = "", show: Callable[[float], str] = short
) -> str:
    """Value axis, drawing and end labels in a row, the tokens below; `data` is what the read-out shows."""
    numbers = tick_texts(scale.ticks()) if show is short else [show(value) for value in scale.ticks()]
    side = "".join(
        f'<i style="top:{scale.y(value):.1f}px">{escape(number)}</i>'
        for value, number in zip(scale.ticks(), numbers, strict=True)
    )
    return (
        f'<div class="plot" style="--h:{scale.height}px"><div class="y">{side}</div>'
        f'<div class="area"{data}><svg viewBox="0 0 {WIDTH} {scale.height}" preserveAspectRatio="none" '
        f'aria-hidden="true">{drawing}</svg></div><div class="ends">{labels}</div>{token_axis(axis)}</div>'
    )


def token_axis(axis: Axis) -> str:
    """Round numbers of tokens below a drawing."""
    marks = [value for value in ticks(axis.first, axis.last, 6) if axis.x(value) <= WIDTH]
    texts = "".join(f'<i style="left:{axis.x(value) / WIDTH:.2%}">{tick(value)}</i>' for value in marks)
    return f'<div class="x">{texts}</div>'


def cropped(chart: Chart, axis: Axis) -> list[float]:
    """The values that the picture must hold: without the first tenth where that would take most of the height."""
    points = [point for line in chart.lines for point in line.points if math.isfinite(point[1])]
    every, border = [value for _, value in points], axis.first + CROPPED * (axis.last - axis.first)
    late = [value for tokens, value in points if tokens >= border] or every
    low = min(every)
    return [*late, low] if max(every) - low > CROP_FROM * (max(late) - low) else every


def scale_for(values: Sequence[float], chart: Chart) -> Scale:
    """A scale that holds all values with a little room."""
    if chart.log:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        low, high = (low / 1.5, high * 1.5) if high < 3 * low else (low / 1.15, high * 1.15)
        return Scale(low=low, high=high, height=chart.height, log=True)
    low, high = min(values), max(values)
    low = min(low, 0.0) if chart.zero else low
    flat = high - low <= 1e-9 * abs(high)
    room = (0.1 * abs(high) or 1.0) if flat else 0.06 * (high - low)
    room = max(room, (chart.least - (high - low)) / 2)
    return Scale(low=low if chart.zero and low == 0 else low - room, high=high + room, height=chart.height)


def grid(axis: Axis, scale: Scale) -> str:
    """Thin lines at the values, stage borders dotted, restarts dashed."""
    level = "".join(f"M0 {scale.y(value):.1f}H{WIDTH}" for value in scale.ticks())
    border = "".join(f"M{axis.x(tokens):.1f} 0V{scale.height}" for tokens, _ in axis.borders)
    restart = "".join(f"M{axis.x(tokens):.1f} 0V{scale.height}" for tokens in axis.restarts)
    paths = (("grid", level), ("border", border), ("restart", restart))
    return "".join(f'<path class="{name}" d="{path}"/>' for name, path in paths if path)


def curve(line: Line, axis: Axis, scale: Scale) -> str:
    """One curve as a path; it is broken where a value is not finite."""
    points = thin(line.points)
    pieces, pen = [], "M"
    for tokens, value in points:
        if not math.isfinite(value) or value > scale.high:
            pen = "M"
            continue
        place = f"{axis.x(tokens):.1f} {scale.y(value):.1f}"
        pieces.append(f"M{place}h0" if line.kind == "dots" else f"{pen}{place}")
        pen = "L"
    joined = curve_of_dots(line, axis, scale) if line.kind == "dots" else ""
    return f'{joined}<path class="{line.kind} c{line.colour}" d="{"".join(pieces)}"/>'


def curve_of_dots(line: Line, axis: Axis, scale: Scale) -> str:
    """The thin line that joins dots."""
    return curve(Line(label="", points=line.points, colour=line.colour), axis, scale)


def readout(lines: Iterable[Line]) -> str:
    """The attribute that the page's script reads when the pointer is over a chart."""
    shown = [
        {
            "n": line.label,
            "c": line.colour,
            "p": [[round(tokens), _digits(value)] for tokens, value in thin(line.points, 300) if math.isfinite(value)],
        }
        for line in lines
        if not line.hidden
    ]
    return f" data-lines='{escape(json.dumps(shown, separators=(',', ':')), quote=True)}'"


def spread(places: Sequence[float], height: float, gap: float = LABEL_PX) -> list[float]:
    """Places of labels moved as little as needed to be `gap` apart, inside 0..height where they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [0.0] * len(places)
    for rank, i in enumerate(order):
        least = moved[order[rank - 1]] + gap if rank else 0.0
        moved[i] = max(places[i], least)
    limit = height
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def _labels(chart: Chart, scale: Scale) -> str:
    """Names and last values at the right ends, levels among them."""
    entries = []
    for line in chart.lines:
        finite = [value for _, value in line.points if math.isfinite(value)]
        if line.label and finite:
            text = f"<b>{escape(chart.show(finite[-1]))}</b> {escape(line.label)}"
            entries.append((scale.y(finite[-1]), f"t{line.colour}", text))
    entries += [(scale.y(value), "level", escape(name)) for value, name in chart.levels]
    places = spread([place for place, _, _ in entries], scale.height)
    return "".join(
        f'<i class="{name}" style="top:{place:.1f}px">{text}</i>'
        for place, (_, name, text) in zip(places, entries, strict=True)
    )


def _level(value: float, scale: Scale) -> str:
    return f'<path class="level" d="M0 {scale.y(value):.1f}H{WIDTH}"/>'


def _broken(line: Line, axis: Axis) -> str:
    """Crosses at the top where a value was not finite."""
    wrong = [axis.x(tokens) for tokens, value in line.points if not math.isfinite(value)]
    return f'<path class="broken" d="{"".join(f"M{x:.1f} 0v9" for x in wrong[:200])}"/>' if wrong else ""


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
