"""What ranks have told in their beats (trainer/heartbeat.py), read by others: who is missing, who is slow. No torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from trainer.parallel.mesh import Mesh

SLOW = 1.5
"""A straggler's own work in a step, over the median of the others (ours)."""
SEEN_S = 10.0
"""Seconds of steps that a rank must have been looked at in before its own work says anything."""
SILENT_S = 15.0
"""A beat comes every second; without one for so long something has stopped the whole process (ours)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One rank's last beat. step, row: counted from 1; rows: of the step; own_s: its work in a step without waiting."""

    rank: int
    size: int
    place: str
    pid: int
    time: float
    count: int
    doing: str
    attempt: int = 0
    step: int | None = None
    rows: int | None = None
    row: int | None = None
    age_s: float = 0.0
    limit_s: float = 0.0
    patience_s: float = 0.0
    seen_s: float = 0.0
    own_s: float | None = None
    at: str = ""
    exchange: Mapping[str, Any] | None = None
    failed: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Number and coordinates."""
        return f"rank {self.rank} ({self.place})" if self.place else f"rank {self.rank}"

    @property
    def where(self) -> str:
        """Step, row and phase."""
        parts = [f"step {self.step}"] if self.step else []
        parts += [f"row {self.row} of {self.rows}"] if self.row else []
        return ", ".join([*parts, *([self.doing] if self.doing != "step" else [])]) or "start"

    @property
    def waits(self) -> str:
        """What it waits for, "" where it does not."""
        if self.exchange is None:
            return ""
        others = [rank for rank in self.exchange["ranks"] if rank != self.rank]
        return f"{self.exchange['call']} with {listed(others)}"


def coordinates(mesh: Mesh, rank: int) -> str:
    """Where a rank stands on the axes that have more than one, "" for one process."""
    place = mesh.place(rank)
    axes = {"pipe": mesh.pipe, "context": mesh.context, "data": mesh.data, "expert": mesh.expert}
    return ", ".join(f"{axis} {getattr(place, axis)}" for axis, size in axes.items() if size > 1)


def read(folder: Path) -> list[Rank]:
    """The ranks that beat in a folder, in order; those of a layout that is no more are left out."""
    found = {}
    for path in folder.glob("rank-*.beat"):
        one = _read(path)
        if one is not None:
            found[one.rank] = one
    newest = max(found.values(), key=lambda one: one.time, default=None)
    return [found[rank] for rank in sorted(found) if newest is not None and rank < newest.size]


def _read(path: Path) -> Rank | None:
    for _ in range(3):  # It may have been written just now.
        try:
            told = json.loads(path.read_bytes())
            return Rank(**{name: told[name] for name in Rank.__slots__ if name in told})
        except (OSError, ValueError, TypeError):
            continue
    return None


def listed(ranks: Sequence[int]) -> str:
    """ "rank 1", "ranks 0, 2"."""
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def suspects(ranks: Sequence[Rank], silent: Mapping[int, float], limit_s: float = SILENT_S) -> list[str]:
    """Those that the others wait for, each with what is known of it; the rest in a last line.

    silent: seconds since a rank's last beat. First who failed by itself, else who does not beat, else who is in no
    exchange; where all wait for each other, all of them.
    """
    failed = [one for one in ranks if one.failed and not one.failed["follows"]]
    mute = [one for one in ranks if not one.failed and silent.get(one.rank, 0.0) > limit_s]
    busy = [one for one in ranks if not one.failed and one.exchange is None]
    chosen = failed or mute or busy or list(ranks)
    lines = []
    for one in chosen:
        if one.failed and not one.failed["follows"]:
            what = f"failed: {one.failed['error']}"
        elif one in mute:
            what = f"no sign of life for {silent[one.rank]:.0f} s"
        elif one.exchange is not None:
            what = f"waits in {one.waits}"
        else:
            what = f"has been there for {one.age_s + silent.get(one.rank, 0.0):.0f} s"
        # Where a mute rank was last seen is not where it is.
        at = f" ({one.at})" if one.at and one not in mute else ""
        lines.append(f"{one.name} in {one.where}{at}: {what}")
    others = [one for one in ranks if one not in chosen]
    for call in sorted({one.exchange["call"] for one in others if one.exchange}):
        waiting = [one.rank for one in others if one.exchange and one.exchange["call"] == call]
        lines.append(f"{listed(waiting)} {'waits' if len(waiting) == 1 else 'wait'} in {call}")
    return lines


def of_row(beats: Sequence[Rank], row: int) -> list[Rank]:
    """The ranks that compute a row of a step, counted from 1: row i is of data rank i mod data."""
    at = [next((int(part[5:]) for part in one.place.split(", ") if part.startswith("data ")), 0) for one in beats]
    data = max(at, default=0) + 1
    return [one for one, place in zip(beats, at, strict=True) if place == (row - 1) % data]


def stragglers(ranks: Sequence[Rank]) -> list[tuple[Rank, float]]:
    """Ranks whose own work in a step is far above that of the others, and how many times their median it is.

    Stages differ by what they hold: so a rank is compared with those of its own stage where there are some.
    """
    told = [one for one in ranks if one.own_s is not None and one.seen_s >= SEEN_S]
    slow = []
    for one in told:
        others = [other for other in told if other is not one]
        peers = [other for other in others if _stage(other) == _stage(one)] or others
        middle = median([other.own_s or 0.0 for other in peers] or [0.0])
        if one.own_s and middle and one.own_s > SLOW * middle:
            slow.append((one, one.own_s / middle))
    return slow


def _stage(rank: Rank) -> str:
    return next((part for part in rank.place.split(", ") if part.startswith("pipe ")), "")
