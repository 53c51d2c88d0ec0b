"""Curves as a small SVG file, for results: an axis with round numbers, a colour for each name, the names beside."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainer.report.numbers import tick_texts, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 380, 60, 130, 40, 40
COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#475569")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Points by x; curves of one name have one colour."""

    name: str
    points: Sequence[tuple[float, float]]


def svg(title: str, curves: Sequence[Curve], across: str = "step") -> str:
    """The picture. Raises ValueError without a point."""
    every = [point for curve in curves for point in curve.points]
    if not every:
        raise ValueError("curves = none: expected a point to draw")
    low, high = min(0.0, *(y for _, y in every)), max(0.0, *(y for _, y in every))
    last, span = max(x for x, _ in every), (high - low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / (last or 1.0), TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / span

    colours = dict(zip(dict.fromkeys(curve.name for curve in curves), COLOURS * len(curves), strict=False))
    parts = [f'<text x="{LEFT}" y="22" font-weight="bold">{escape(title)}</text>']
    marks = ticks(low, high, 6)
    for mark, text in zip(marks, tick_texts(marks), strict=True):
        (left, y), (right, _) = at(0, mark), at(last, mark)
        width = 1.4 if mark == 0 else 0.5
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#999" stroke-width="{width}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    marks = ticks(0, last, 6)
    for mark, text in zip(marks, tick_texts(marks), strict=True):
        x, _ = at(mark, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(across)}</text>')
    for curve in curves:
        path = "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in curve.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colours[curve.name]}" stroke-width="1.3"/>')
    for number, (name, colour) in enumerate(colours.items()):
        y = TOP + 18 * number + 10
        parts.append(f'<text x="{WIDTH - RIGHT + 14}" y="{y}" fill="{colour}">{escape(name)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )
