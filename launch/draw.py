"""A pipeline's schedule as a picture: a line for each rank, a box for each pass, in SVG for light and dark."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.parallel.simulate import Event, Run

LABEL_PX, SHARE_PX, LINE_PX, BOX_PX = 62, 66, 26, 20
TOP_PX, LEGEND_PX = 34, 34
LEAST_PX, MOST_PX = 900, 4000
"""Of the whole time."""
BOX_LEAST_PX = 16
"""Of the shortest pass, where the whole then stays below the most."""
DIGIT_PX = 6.2
ROWS_PER_RANK = 4
"""Of a step with more rows so many are drawn for each pipe rank."""
NAMES = {"F": "forward", "B": "backward", "f": "forward, on the way back", "b": "backward, on the way back"}
STYLE = """
text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: #1b1f24 }
.title { font-weight: 600 } .share { fill: #59616b } .n { text-anchor: middle; font-size: 10px }
.line { fill: #eceef1 } .F { fill: #9cc4ea } .B { fill: #f3bf92 } .f { fill: #4f8fcc } .b { fill: #d98236 }
.nf, .nb { fill: #fff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9ec } .share { fill: #a5adb6 } .line { fill: #252b31 }
  .F { fill: #2f6fae } .B { fill: #a4641f } .f { fill: #8ec3f3 } .b { fill: #f6b27c }
  .nF, .nB { fill: #fff } .nf, .nb { fill: #14171b }
}
"""


def svg(run: "Run", title: str) -> str:
    """The picture of a schedule that has been played through. Boxes have the numbers of their rows, where they fit."""
    longest = run.end
    times = [event.end - event.start for events in run.events for event in events if event.computed]
    shortest = min(filter(None, times))
    scale = min(max(LEAST_PX / longest, BOX_LEAST_PX / shortest), MOST_PX / longest)
    width = LABEL_PX + longest * scale + SHARE_PX
    height = TOP_PX + LINE_PX * len(run.events) + LEGEND_PX
    turn = len(run.events)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="4" y="16">{escape(title)}</text>',
    ]
    for rank, (events, bubble) in enumerate(zip(run.events, run.bubbles, strict=True)):
        top = TOP_PX + LINE_PX * rank
        middle = top + BOX_PX / 2 + 4
        lines += [
            f'<text x="4" y="{middle}">rank {rank}</text>',
            f'<path class="line" d="{_box(LABEL_PX, top, longest * scale, BOX_PX)}"/>',
            *_boxes(events, turn, top, scale),
            f'<text class="share" x="{LABEL_PX + longest * scale + 6:.1f}" y="{middle}">{bubble:.1%} idle</text>',
        ]
    kinds = {_kind(event, turn) for events in run.events for event in events}
    return "\n".join([*lines, *_legend(kinds, height - LEGEND_PX + 14), "</svg>", ""])


def _boxes(events: Sequence["Event"], turn: int, top: float, scale: float) -> Iterator[str]:
    """One path for the boxes of a kind, then their numbers."""
    paths: dict[str, list[str]] = {}
    numbers = []
    for event in events:
        kind, left, size = _kind(event, turn), LABEL_PX + event.start * scale, (event.end - event.start) * scale
        if size <= 0 or not kind:
            continue
        paths.setdefault(kind, []).append(_box(left, top, max(size - 0.6, 0.4), BOX_PX))
        text = str(event.group[0].row)
        if size >= DIGIT_PX * len(text) + 1:
            numbers.append(f'<text class="n n{kind}" x="{left + size / 2:.1f}" y="{top + 14}">{text}</text>')
    yield from (f'<path class="{kind}" d="{"".join(boxes)}"/>' for kind, boxes in paths.items())
    yield from numbers


def _kind(event: "Event", turn: int) -> str:
    """F or B, small where the chunk is on the way back; nothing for a transfer, which is time without a pass."""
    if event.computed is None:
        return ""
    letter = "F" if event.computed.way == "forward" else "B"
    return letter.lower() if event.computed.chunk >= turn else letter


def _box(left: float, top: float, width: float, height: float) -> str:
    return f"M{left:.1f} {top:.1f}h{width:.1f}v{height}h-{width:.1f}z"


def _legend(kinds: set[str], y: float) -> Iterator[str]:
    x = float(LABEL_PX)
    for kind, name in NAMES.items():
        if kind in kinds:
            yield f'<path class="{kind}" d="{_box(x, y - 10, 14, 12)}"/><text x="{x + 20}" y="{y}">{name}</text>'
            x += 46 + DIGIT_PX * len(name)
    yield f'<path class="line" d="{_box(x, y - 10, 14, 12)}"/><text x="{x + 20}" y="{y}">idle; numbers are rows</text>'
