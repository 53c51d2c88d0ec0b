"""What a verdict is: a level, and the reasons for it in words and numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "look", "bad"]
LEVELS: tuple[Level, ...] = ("good", "look", "bad")
"""From harmless to grave. look: a person should look at it; bad: training as it goes is probably wasted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One observation; `text` has the numbers."""

    level: Level
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The answer to one question. reasons: the gravest first."""

    question: str
    level: Level
    reasons: tuple[Reason, ...]


def judge(question: str, reasons: Iterable[Reason | None]) -> Verdict:
    """As grave as the gravest reason; without any reason there is nothing to go by, which is worth a look."""
    found = [reason for reason in reasons if reason is not None]
    found = found or [Reason(level="look", text="nothing has been measured yet")]
    ordered = sorted(found, key=lambda reason: -LEVELS.index(reason.level))
    return Verdict(question=question, level=ordered[0].level, reasons=tuple(ordered))


def above(value: float, look: float, bad: float = float("inf")) -> Level:
    """good up to `look`, look up to `bad`, bad beyond; what is not a number is bad."""
    return "good" if value <= look else "look" if value <= bad else "bad"
