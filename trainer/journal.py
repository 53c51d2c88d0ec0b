"""Append-only files of one JSON object per line, such as metrics.jsonl and history.jsonl.

Every row is one write to the end of the file, so it survives the process at once; `sync` makes it survive the machine.
A line that a crash cut off is dropped when the file is opened again. Strict JSON: a number that is not finite is
written as "NaN", "Infinity" or "-Infinity", which Python's float() reads back.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer import durable


class Journal:
    """A file of rows, open for appending; opening it drops a torn last line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+", buffering=0)
        self._file.truncate(_whole_bytes(path))

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row; raises TypeError for values that JSON does not know, OSError for a full disk."""
        self._file.write(as_line(row).encode() + b"\n")

    def sync(self) -> None:
        """Returns when all rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes."""
        self.sync()
        self._file.close()


def as_line(row: Mapping[str, Any]) -> str:
    """A row as one line of strict JSON; raises TypeError for values that JSON does not know."""
    return json.dumps(_finite(row), allow_nan=False)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a torn last line is left out. Raises ValueError naming file and line for one that is not JSON."""
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                rows.append(parse(path, number, line))
    return rows


def keep(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> int:
    """Rewrites the file with the wanted rows only and returns how many went; after a crash it is the old or the new."""
    if not path.exists():
        return 0
    temporary, dropped = path.with_name(f".{path.name}.writing"), 0
    with path.open("rb") as source, temporary.open("wb") as target:
        for number, line in enumerate(source, start=1):
            if line.endswith(b"\n"):
                keeps = wanted(parse(path, number, line))
                target.write(line if keeps else b"")
                dropped += not keeps
    durable.sync(temporary)
    temporary.replace(path)
    durable.sync(path.parent)
    return dropped


def parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line as a row; raises ValueError naming file and line when it is not JSON."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} line {number} = {line[:60]!r}: expected a JSON object") from error


def _finite(value: Any) -> Any:
    """Also inside lists and objects, such as a histogram."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _whole_bytes(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    size, step = path.stat().st_size, 1 << 16
    with path.open("rb") as file:
        for start in range(max(size - step, 0), -step, -step):
            file.seek(max(start, 0))
            newline = file.read(step).rfind(b"\n")
            if newline >= 0:
                return max(start, 0) + newline + 1
    return 0
