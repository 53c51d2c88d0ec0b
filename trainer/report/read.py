"""A run folder as plain data: what is in it, and whether a process is training in it now."""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer import journal, ranks
from trainer.schedule import plan
from trainer.schedule_config import (
    AttentionStage,
    BatchConfig,
    MtpWeightStage,
    RateConfig,
    RowLengthStage,
    ScheduleConfig,
)

State = Literal["running", "finished", "stopped", "failed", "died"]
"""finished: all steps done. stopped: on request, saved. failed: by an error. died: its process ended without a word."""

WINDOW_SHARE, WINDOW_LEAST, WINDOW_MOST = 4, 16, 512
"""'The last steps' are the last quarter of the steps so far, but at least 16 and at most 512 of them."""

_STOPPED = re.compile(r"SIG[A-Z]+|stop at step \d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A committed checkpoint: its step and when it was committed."""

    step: int
    time: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything the page and the terminal show. rows: metrics.jsonl; history: history.jsonl; now: when it was read.

    total_tokens: what the `tokens` of the last row will be. beats: the last of each rank.
    """

    path: Path
    config: Mapping[str, Any]
    state: State
    now: datetime
    total_steps: int
    total_tokens: int
    rows: Sequence[Mapping[str, Any]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    checkpoints: Sequence[Saved] = ()
    overrides: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, str] = field(default_factory=dict)
    beats: Sequence[ranks.Rank] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def step(self) -> int:
        """Steps done."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.rows[-1]["tokens"] if self.rows else 0

    @property
    def ended(self) -> Mapping[str, Any]:
        """The last history row if it tells of an end, else nothing."""
        return self.history[-1] if self.history and self.history[-1].get("event") == "end" else {}

    @property
    def restarts(self) -> Sequence[Mapping[str, Any]]:
        """The history's rows about processes that failed and were started again, without being asked."""
        return [row for row in self.history if row.get("event") == "restart"]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(tokens, value) of every row that has the metric; "NaN" and "Infinity" become floats."""
        return [(row["tokens"], float(row[name])) for row in self.rows if name in row]

    def last(self, name: str) -> float | None:
        """The newest value of a metric, None where there is none."""
        return next((float(row[name]) for row in reversed(self.rows) if name in row), None)

    def window(self) -> Sequence[Mapping[str, Any]]:
        """The rows of 'the last steps'."""
        count = min(max(len(self.rows) // WINDOW_SHARE, WINDOW_LEAST), WINDOW_MOST)
        return self.rows[-count:]

    def below(self, prefix: str) -> list[str]:
        """The metrics `prefix`NAME, in order."""
        return sorted({name for row in self.rows for name in row if name.startswith(prefix)})


class Folder:
    """A run folder, to be read once or again and again; a later reading parses only what has been added."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when `path` is not a run folder."""
        try:
            self._config = yaml.load((path / "config.yaml").read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            self._provenance = json.loads((path / "provenance.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"RUN = {path}: expected a run folder with config.yaml and provenance.json") from error
        self._path = path
        plans = plan(_schedule(self._config["schedule"]))
        last = plans[len(plans) - 1]
        self._total = len(plans), last.tokens + last.rows * last.row_length
        self._rows: list[dict[str, Any]] = []
        self._read: tuple[int, int] = (0, 0)
        """Inode of metrics.jsonl and how many bytes of it have been parsed; a resume replaces the file."""

    def read(self, now: datetime | None = None) -> Run:
        """The run as it is now (`now`: for the clock readings on the page; the present moment where none is given)."""
        # The lock first: a run that ends while we read is then called running, never one that died.
        locked = is_locked(self._path)
        history = journal.read(self._path / "history.jsonl")
        self._read_rows()
        return Run(
            path=self._path,
            config=self._config,
            state="running" if locked else _state(history),
            now=now or datetime.now(UTC).astimezone(),
            total_steps=self._total[0],
            total_tokens=self._total[1],
            rows=tuple(self._rows),
            history=history,
            checkpoints=_checkpoints(self._path / "checkpoints"),
            overrides=_text(self._path / "overrides.txt").splitlines(),
            provenance=self._provenance,
            beats=ranks.read(self._path / "ranks"),
            samples={path.name: _text(path) for path in sorted((self._path / "samples").glob("*.txt"))},
        )

    def _read_rows(self) -> None:
        path = self._path / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            inode, done = self._read
            if inode != about.st_ino or about.st_size < done:
                self._rows, done = [], 0
            file.seek(done)
            new = file.read(about.st_size - done)
        whole = new[: new.rfind(b"\n") + 1]
        first = len(self._rows) + 1
        self._rows += [journal.parse(path, number, line) for number, line in enumerate(whole.splitlines(), first)]
        self._read = about.st_ino, done + len(whole)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the run folder `path`."""
    try:
        descriptor = os.open(path / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def newest(runs_dir: Path) -> Path:
    """The run whose files changed last; raises ValueError where there is none."""
    found = {path.parent: _touched(path.parent) for path in runs_dir.glob("[!.]*/config.yaml")}
    if not found:
        raise ValueError(f"RUN = : expected a run's folder or name ({runs_dir}/ has none yet)")
    return max(found, key=lambda path: found[path])


def _touched(path: Path) -> float:
    files = (path / name for name in ("metrics.jsonl", "history.jsonl", "config.yaml"))
    return max(file.stat().st_mtime for file in files if file.exists())


def _state(history: Sequence[Mapping[str, Any]]) -> State:
    if not history or history[-1].get("event") != "end":
        return "died"
    reason = history[-1]["reason"]
    if reason == "finished":
        return "finished"
    return "stopped" if _STOPPED.fullmatch(reason) else "failed"


def _checkpoints(path: Path) -> list[Saved]:
    commits: Iterable[Path] = path.glob("step-*/COMMIT")
    saved = []
    for commit in commits:
        try:
            time = datetime.fromtimestamp(commit.stat().st_mtime, UTC)
        except FileNotFoundError:
            continue  # Deleted since: only the newest are kept.
        saved.append(Saved(step=int(commit.parent.name.removeprefix("step-")), time=time))
    return sorted(saved, key=lambda one: one.step)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _schedule(values: Mapping[str, Any]) -> ScheduleConfig:
    """The schedule section of a config.yaml as the class that evaluates it."""
    parts: dict[str, Any] = {
        "rate": RateConfig(**values["rate"]),
        "batch": BatchConfig(**values["batch"]),
        "row_length": tuple(RowLengthStage(**stage) for stage in values["row_length"]),
        "attention": tuple(AttentionStage(**stage) for stage in values["attention"]),
        "mtp_weight": tuple(MtpWeightStage(**stage) for stage in values["mtp_weight"]),
    }
    return ScheduleConfig(**{**values, **parts})
