"""What a trace says: the first tensor that is not finite, the documents it is about, and a table of all modules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from trainer.debug.trace import Event

COLUMNS = ("weight", "input", "output", "gradient of output", "gradient of input", "gradient of weight")
FIRST_MARK = "**first**"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The first tensor that is not finite. before: the tensor before it, None for a weight.

    same: other names of a gradient: the output of one module is the input of those that use it, and any of these may
    have made the gradient what it is.
    tokens: positions in the row at which it, or the next tensor with a row's axis, is not finite; empty where there is
    none, as in the gradient of a weight, which is a sum over positions.
    """

    event: Event
    before: Event | None
    tokens: tuple[int, ...]
    same: tuple[str, ...] = ()

    def __str__(self) -> str:
        event, size = self.event, math.prod(self.event.shape)
        layer = layer_of(event.module)
        where = f" at {list(event.index)} of {list(event.shape)}" if event.shape else ""
        same = f" ({', '.join(self.same)})" if self.same else ""
        text = f"{layer + ', ' if layer else ''}{event.name}{same}: {event.found}{where}"
        text += f" ({event.bad} of {size} elements not finite)" if size > 1 else ""
        if self.before is not None:
            return f"{text}; largest value before it {self.before.largest:.3g}, {self.before.name}"
        return f"{text}; largest finite value in it {event.largest:.3g}"


def find(events: Sequence[Event]) -> Finding | None:
    """The first tensor that is not finite, weights before what is computed with them; None if all are finite."""
    first = next((number for number, event in enumerate(events) if event.bad), None)
    if first is None:
        return None
    event = events[first]
    phase = "forward" if event.phase == "weight" else event.phase
    with_tokens = (one.tokens for one in events[first:] if one.phase == phase and one.tokens)
    tokens = () if event.tensor.startswith("gradient of weight") else next(with_tokens, ())
    following = takewhile(lambda one: one.phase == "backward" and _content(one) == _content(event), events[first + 1 :])
    return Finding(
        event=event,
        before=None if event.phase == "weight" else events[first - 1],
        tokens=tokens,
        same=tuple(one.name for one in following),
    )


def _content(event: Event) -> tuple[object, ...]:
    return event.shape, event.largest, event.bad, event.index, event.found


def layer_of(module: str) -> str:
    """ "layer 3", "MTP block", or "" for what belongs to no layer."""
    kind, _, rest = module.partition(".")
    return {"layers": f"layer {rest.split('.')[0]}", "mtp": "MTP block"}.get(kind, "")


def table(events: Sequence[Event], first: Event | None) -> list[str]:
    """A Markdown table: of each module, in the order of the forward pass, the largest |value| of what passes it.

    Of several tensors in a place the first counts; a cell with anything not finite shows such a value and how many.
    """
    modules: dict[str, dict[str, list[Event]]] = {}
    for phase in ("forward", "weight", "backward"):
        for event in events:
            if event.phase == phase:
                cells = modules.setdefault(event.module, {column: [] for column in COLUMNS})
                cells[_column(event)].append(event)
    rows = [("module", *COLUMNS)]
    rows += [
        (module or "(model)", *(_cell(cell, first) for cell in cells.values())) for module, cells in modules.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    losses = [event for event in events if event.phase == "loss"]
    told = [f"{event.name} {event.found if event.bad else f'{event.largest:.6g}'}" for event in losses]
    return [*lines, "", f"losses (sums over the row, nats): {', '.join(told)}"]


def _column(event: Event) -> str:
    return next(column for column in reversed(COLUMNS) if event.tensor.startswith(column))


def _cell(events: Sequence[Event], first: Event | None) -> str:
    if not events:
        return ""
    bad = [event for event in events if event.bad]
    mark = f" {FIRST_MARK}" if first is not None and any(event is first for event in events) else ""
    if bad:
        return f"{bad[0].found} x {sum(event.bad for event in bad)}{mark}"
    main = min(events, key=lambda event: len(event.tensor))
    return f"{main.largest:.1e}"
