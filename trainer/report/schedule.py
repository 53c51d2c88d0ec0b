"""Is it on schedule? Steps, speed, waiting, checkpoints, restarts, and when it will end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from trainer.report.numbers import duration, moment, percent, short
from trainer.report.read import Run
from trainer.report.verdict import Level, Reason, Verdict, above, judge

SLOWER_LOOK, SLOWER_BAD = 1.5, 3.0
"""Seconds per token of the last steps over the median of all steps with the same rows and attention."""

SILENT_LOOK_S, SILENT_BAD_S = 60.0, 600.0
SILENT_LOOK_STEPS, SILENT_BAD_STEPS = 10.0, 50.0
"""How long no step has ended: both so many seconds and so many times the median step."""

WAIT_LOOK, WAIT_BAD = 0.05, 0.25
"""Share of a step that waits for data."""

LATE_LOOK = 2.0
"""Steps since the last checkpoint over checkpoint.every_steps."""

LOST_LOOK, LOST_BAD = 0.1, 0.5
"""Share of the time since the start that no kept step accounts for: down, or repeated after a restart."""
LOST_LEAST_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One process on the run: when it began, after which step, and seconds up to its last kept step."""

    began: datetime
    first_step: int
    kept_s: float


def on_schedule(run: Run) -> Verdict:
    """The verdict from a run's rows, history and checkpoints."""
    return judge(
        "on schedule",
        [
            state(run),
            _silent(run),
            slower(run.rows, len(run.window())),
            waiting(run.window()),
            checkpoint_age(run.step, run.checkpoints[-1].step if run.checkpoints else 0, _every(run)),
            _lost(run),
        ],
    )


def state(run: Run) -> Reason:
    """How far it is, and what became of it."""
    done = f"{run.step} of {run.total_steps} steps"
    speed = tokens_per_s(run)
    pace = f", {short(speed)} tokens/s" if speed else ""
    if run.state == "finished":
        return Reason(level="good", text=f"finished: {done}{pace}")
    if run.state == "running":
        left = seconds_left(run)
        end = f", ends at {moment(run.now + timedelta(seconds=left), run.now)}" if left is not None else ""
        return Reason(level="good", text=f"{done}{pace}{end}")
    if run.state == "stopped":
        return Reason(level="look", text=f"stopped after {done} ({run.ended['reason']}); the same command continues it")
    if run.state == "failed":
        return Reason(level="bad", text=f"failed after {done}: {run.ended['reason']}")
    return Reason(level="bad", text=f"its process ended without a word after {done}; `keel resume` goes on")


def silent(seconds: float, step_s: float) -> Reason | None:
    """How long a running run has not finished a step; None while that is usual."""
    look = seconds > SILENT_LOOK_S and seconds > SILENT_LOOK_STEPS * step_s
    bad = seconds > SILENT_BAD_S and seconds > SILENT_BAD_STEPS * step_s
    text = f"no step for {duration(seconds)}, where one takes {duration(step_s)}"
    return Reason(level="bad" if bad else "look", text=text) if look else None


def slower(rows: Sequence[Mapping[str, Any]], last: int) -> Reason | None:
    """The last steps against all of the same kind; None while they are as fast."""
    kind = ("schedule/rows", "schedule/row_length", "schedule/attention")
    same = [row for row in rows if [row.get(key) for key in kind] == [rows[-1].get(key) for key in kind]]
    same = [row for row in same if row.get("speed/tokens_per_s")]
    recent = same[-max(last // 2, 8) :]
    if not recent or len(same) < 2 * len(recent):
        return None
    usual, now = (median(float(row["speed/tokens_per_s"]) for row in part) for part in (same, recent))
    level = above(usual / now, SLOWER_LOOK, SLOWER_BAD)
    text = f"{short(now)} tokens/s over the last {len(recent)} steps, {usual / now:.1f} times slower than usual"
    return None if level == "good" else Reason(level=level, text=text)


def waiting(rows: Sequence[Mapping[str, Any]]) -> Reason | None:
    """Share of the last steps' time that went into waiting for data."""
    measured = [row for row in rows if "time/wait_s" in row]
    whole = sum(row["time/step_s"] for row in measured)
    if not whole:
        return None
    share = sum(row["time/wait_s"] for row in measured) / whole
    return Reason(level=above(share, WAIT_LOOK, WAIT_BAD), text=f"{percent(share)} of the time waits for data")


def checkpoint_age(step: int, saved: int, every: int) -> Reason | None:
    """Steps that a crash would lose."""
    if not step:
        return None
    level: Level = above((step - saved) / every, LATE_LOOK)
    text = f"last checkpoint at step {saved}" if saved else "no checkpoint yet"
    return Reason(level=level, text=text if saved == step else f"{text}, {step - saved} steps ago")


def lost(away_s: float, whole_s: float, restarts: int) -> Reason | None:
    """Time that restarts have cost."""
    if not restarts:
        return None
    share = away_s / whole_s if whole_s else 0.0
    level = above(share, LOST_LOOK, LOST_BAD) if away_s > LOST_LEAST_S else "good"
    times = "1 restart" if restarts == 1 else f"{restarts} restarts"
    return Reason(level=level, text=f"{times}, {duration(away_s)} of {duration(whole_s)} down or repeated")


def sessions(run: Run) -> list[Session]:
    """The processes that have worked on the run, in order."""
    begun = [row for row in run.history if row.get("event") in ("start", "resume")]
    ends = [row["step"] for row in begun[1:]] + [run.total_steps] * bool(begun)
    found = []
    for row, end in zip(begun, ends, strict=True):
        kept = [one["time/run_s"] for one in run.rows if row["step"] < one["step"] <= end and "time/run_s" in one]
        began = datetime.fromisoformat(row["time"])
        found.append(Session(began=began, first_step=row["step"], kept_s=max(kept, default=0.0)))
    return found


def tokens_per_s(run: Run) -> float | None:
    """Speed of the last steps of this session, validation and saving included."""
    known = sessions(run)
    began = known[-1].first_step if known else 0
    rows = [row for row in run.window() if row["step"] > began and "time/run_s" in row]
    if len(rows) < 2:
        return rows[-1].get("speed/tokens_per_s") if rows else None
    seconds = rows[-1]["time/run_s"] - rows[0]["time/run_s"]
    return (rows[-1]["tokens"] - rows[0]["tokens"]) / seconds if seconds > 0 else None


def seconds_left(run: Run) -> float | None:
    """At the present speed."""
    speed = tokens_per_s(run)
    return max(run.total_tokens - run.tokens, 0) / speed if speed else None


def last_step_at(run: Run) -> datetime | None:
    """When the newest row was written, by the clock of the process that wrote it."""
    known = sessions(run)
    return known[-1].began + timedelta(seconds=known[-1].kept_s) if known else None


def _silent(run: Run) -> Reason | None:
    ended = last_step_at(run)
    steps = [row["time/step_s"] for row in run.window() if "time/step_s" in row]
    if run.state != "running" or ended is None or not steps:
        return None
    return silent((run.now - ended).total_seconds(), median(steps))


def _lost(run: Run) -> Reason | None:
    known, ended = sessions(run), last_step_at(run)
    if not known or ended is None:
        return None
    whole = (ended - known[0].began).total_seconds()
    return lost(max(whole - sum(one.kept_s for one in known), 0.0), whole, len(known) - 1)


def _every(run: Run) -> int:
    return run.config["checkpoint"]["every_steps"]
