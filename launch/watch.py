"""What a supervisor knows of its ranks beside their exit codes: their beats, who has hung, which failure was the first.

Only this machine's clock counts here, from the moment a beat was seen to change.
"""

import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer import ranks
from trainer.heartbeat import FIRST_S
from trainer.ranks import Rank

STOPPED_S = 10.0
"""A rank that somebody has stopped (SIGSTOP) has hung after so long, or after `patience_s` if that is less (ours)."""
AWAY_S = 5.0
"""If we ourselves were not here for so long, stopped or without a turn, the ranks were not either."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """What ended an attempt. rank: None where all ranks failed together; step: for comparison with the next failure."""

    rank: int | None
    line: str
    step: int | None
    code: int


class Watch:
    """The beats in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = self._looked = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._stopped: dict[int, float] = {}

    def run(self) -> Path | None:
        """The run's folder, once the ranks have found or made it."""
        file = self._folder / "run"
        return Path(file.read_text()) if file.exists() else None

    def beats(self) -> dict[int, Rank]:
        """The last beats, by rank."""
        return {one.rank: one for one in ranks.read(self._folder)}

    def hung(self, alive: Mapping[int, int]) -> list[str]:
        """Why the job has hung, the culprit first; nothing while it has not. alive: process numbers by rank."""
        now = time.monotonic()
        if now - self._looked > AWAY_S:
            self._began, self._seen, self._stopped = now, {}, {}
        self._looked, beats = now, self.beats()
        silent = {rank: now - self._changed(rank, beats.get(rank), now) for rank in alive}
        for rank, process in alive.items():
            if is_stopped(process):
                self._stopped.setdefault(rank, now)
            else:
                self._stopped.pop(rank, None)
        for rank, since in self._stopped.items():
            known = beats.get(rank)
            limit_s = min(STOPPED_S, known.patience_s or STOPPED_S) if known else STOPPED_S
            if now - since >= limit_s:
                return _told(beats, alive, {rank: now - since}, 0.0)
        stuck = [
            silent[rank] >= FIRST_S
            if (one := beats.get(rank)) is None
            else one.age_s + silent[rank] >= one.limit_s and not one.failed
            for rank in alive
        ]
        return _told(beats, alive, silent, AWAY_S) if stuck and all(stuck) else []

    def _changed(self, rank: int, beat: Rank | None, now: float) -> float:
        """When a rank's beat was seen to change."""
        count = -1 if beat is None else beat.count
        known = self._seen.get(rank)
        if known is None or known[0] != count:
            self._seen[rank] = known = (count, self._began if count < 0 else now)
        return known[1]


def _told(
    beats: Mapping[int, Rank], alive: Mapping[int, int], silent: Mapping[int, float], limit_s: float
) -> list[str]:
    unknown = [rank for rank in alive if rank not in beats]
    lines = [
        f"rank {rank} before its first beat: no sign of life" for rank in unknown if silent.get(rank, 0.0) > limit_s
    ]
    return lines or ranks.suspects([beats[rank] for rank in alive if rank in beats], silent, limit_s)


def first_failure(failed: Sequence[tuple[int, int, float]], beats: Mapping[int, Rank]) -> int:
    """The rank that failed first: of those that did not only lose another, if there are some.

    failed: rank, exit code, and when it was seen to have ended, on the wall clock.
    """

    def order(one: tuple[int, int, float]) -> tuple[bool, float]:
        rank, code, ended = one
        note = beats[rank].failed if rank in beats else None
        if note is None or code < 0:
            return False, ended
        return bool(note["follows"]), note["time"]

    return min(failed, key=order)[0]


def together(failed: Collection[int], size: int, beats: Mapping[int, Rank]) -> str:
    """The error that all ranks have raised alike, "" where there is none: they have agreed on it."""
    notes = [beats[rank].failed if rank in beats else None for rank in failed]
    errors = {"" if note is None or note["follows"] else note["error"] for note in notes}
    return errors.pop() if len(failed) == size > 1 and len(errors) == 1 else ""


def keep(folder: Path, known: Path | None) -> Path:
    """Where the ranks' words are from now on: in the run's folder, if that is known and has room for them."""
    if known is None:
        return folder
    number = 1 + len(list((known / "logs").glob("ranks-*")))
    try:
        (known / "logs" / f"ranks-{number}").mkdir(parents=True)
        for file in folder.glob("rank-*"):
            shutil.copy(file, known / "logs" / f"ranks-{number}")
    except OSError:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    return known / "logs" / f"ranks-{number}"


def is_stopped(process: int) -> bool:
    """Whether a process is stopped by a signal; known on Linux only."""
    if sys.platform != "linux":
        return False
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False
