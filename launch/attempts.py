"""Starting a run's processes on this machine again when they have failed, from the run's last checkpoint."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch import local
from launch.watch import Cause
from trainer import journal, redact

NEW = "--new"
"""Would start afresh once more."""


def start(words: Sequence[str], size: int, restarts: int) -> int:
    """Run `keel WORDS` as `size` ranks until all have ended; returns the exit code of all together.

    Every attempt has its own port and part of the store. It ends with a reason when all restarts are used up, or when
    a step fails that has failed in the attempt before: nothing was won then.
    """
    failed_at: int | None = None
    for number in range(restarts + 1):
        ended = local.attempt(local.command_of(words), size, number, is_last=number == restarts)
        if ended.cause is None:
            return ended.code
        if ended.run is not None:
            _note_end(ended.run, ended.cause)
        if restarts and number and ended.cause.step == failed_at:
            where = f"step {failed_at}" if failed_at else "the start"
            _say(f"no restart: {where} has failed again, without a step done in between")
            return ended.code
        if number == restarts:
            break
        failed_at = ended.cause.step
        _say(f"restart {number + 1} of {restarts}, from the last checkpoint")
        if ended.run is not None:
            _note(ended.run, {"event": "restart", "attempt": number + 1, "reason": ended.cause.line}, ended.cause)
            words = [word for word in words if word != NEW]
    if restarts:
        _say(f"no restart: restarts = {restarts} are used up")
    return ended.code


def _say(text: str) -> None:
    print(f"keel: {text}", file=sys.stderr, flush=True)


def _note_end(run: Path, cause: Cause) -> None:
    """The cause, where no rank was left that knew it."""
    rows = journal.read(run / "history.jsonl")
    if not rows or rows[-1].get("event") != "end":
        _note(run, {"event": "end", "reason": cause.line}, cause)


def _note(run: Path, row: dict[str, Any], cause: Cause) -> None:
    """A row of the run's history, which no rank is writing now; step: the last that was done, as far as is known."""
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": max((cause.step or 1) - 1, 0)}
    try:
        history = journal.Journal(run / "history.jsonl")
        history.append({**about, **row, "reason": redact.in_text(row["reason"])})
        history.close()
    except OSError as error:
        _say(f"that could not be noted in {run}: {error}")
