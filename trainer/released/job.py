"""A folder made of many large files, written so that it can be broken off anywhere and gone on with.

    .writing-NAME/journal.jsonl    what is being made; then a line for each file that is on the disk, with its hashes
    .writing-NAME/...              the files
    NAME/                          the same folder, renamed when it is whole

A file with a line in the journal is verified and not written again; any other is removed and written anew. What is
wrong with the source removes the unfinished folder; a full disk, a source that cannot be read, Ctrl-C or a kill leave
it for the same command to go on with.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import durable, journal
from trainer.journal import Journal
from trainer.manifest import CheckpointError
from trainer.released.stream import Entry, Stream, WrittenFile, as_written, is_intact

JOURNAL = "journal.jsonl"
LINE_S = 10.0
"""How often progress is told (ours)."""
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What is written together: entries of one file, and what writes them and returns a row of the report."""

    entries: tuple[Entry, ...]
    write: Callable[[Stream], Row]

    @property
    def size_bytes(self) -> int:
        """Of all entries."""
        return sum(entry.size_bytes for entry in self.entries)


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What was made: the files, and the rows of the report in order."""

    files: tuple[WrittenFile, ...]
    rows: tuple[Row, ...]


def share_out(items: Sequence[Item], file_bytes: int) -> list[list[Item]]:
    """The items of each file, in order; none has more than `file_bytes`, unless a single item has."""
    files: list[list[Item]] = []
    size = 0
    for item in items:
        if not files or size + item.size_bytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(item)
        size += item.size_bytes
    return files


def make(
    out: Path,
    what: Mapping[str, Any],
    files: Mapping[str, Sequence[Item]],
    finish: Callable[[Path, Done], None],
    say: Say,
) -> Done:
    """Make the folder `out` of these files, then let `finish` add the small ones.

    what: all that decides the content, as JSON; another `what` does not go on with an unfinished folder. Raises
    ValueError where `out` is there, an unfinished folder is of something else or in use, the disk is full or a source
    cannot be read.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"OUT = {out}: expected a folder that does not exist yet")
    working = out.parent / f".writing-{out.name}"
    try:
        working.mkdir(parents=True, exist_ok=True)
        with _locked(working / JOURNAL, out):
            done = _files(working, what, files, say, out)
            finish(working, done)
            durable.sync(working)
            working.rename(out)
            (out / JOURNAL).unlink()
            durable.sync(out.parent)
            return done
    except OSError as error:
        kept = f"; {working} keeps what is whole, the same command goes on with it"
        if {path.name for path in working.glob("*")} <= {JOURNAL}:
            shutil.rmtree(working, ignore_errors=True)
            kept = ""
        raise ValueError(f"{_what_failed(error, working, out)}{kept}") from error
    except _OtherError as error:
        raise ValueError(str(error)) from None
    except (ValueError, CheckpointError):
        shutil.rmtree(working, ignore_errors=True)
        raise


def _what_failed(error: OSError, working: Path, out: Path) -> str:
    """Whether it was a file of ours or one of the source; a write that fails names none."""
    reason, path = error.strerror or str(error), error.filename and Path(error.filename)
    if path and not path.is_relative_to(working) and not out.is_relative_to(path):
        return f"file = {path}: expected a file that can be read ({reason})"
    return f"OUT = {out}: expected a disk that takes it ({reason}{f': {path}' if path else ''})"


class _OtherError(Exception):
    """The unfinished folder is not ours to go on with, nor to delete."""


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _OtherError(f"OUT = {out}: expected a folder that no other process is writing") from None
        yield


def _files(working: Path, what: Mapping[str, Any], files: Mapping[str, Sequence[Item]], say: Say, out: Path) -> Done:
    lines, there = journal.read(working / JOURNAL), [path for path in working.iterdir() if path.name != JOURNAL]
    if lines[:1] != [{"what": what}] and (lines or there):
        other = f"expected no unfinished folder {working} of something else; delete it, or give its words again"
        raise _OtherError(f"OUT = {out}: {other}")
    before = {line["file"]["name"]: line for line in lines[1:]}
    for path in there:
        if path.name not in before:
            path.unlink()
    total = sum(item.size_bytes for items in files.values() for item in items)
    _require_room(working, total - sum(line["file"]["size_bytes"] for line in before.values()), out)
    log, done, progress = Journal(working / JOURNAL), list[WrittenFile](), _Progress(total, say)
    rows: list[Row] = []
    try:
        if not lines:
            log.append({"what": what})
            log.sync()
        for name, items in files.items():
            size = sum(item.size_bytes for item in items)
            line = before.get(name)
            if line is not None and is_intact(working / name, as_written(line["file"])):
                say(f"{name} is there already")
                progress.skip(size)
            else:
                line = _write(working / name, items, progress)
                log.append(line)
                log.sync()
            done.append(as_written(line["file"]))
            rows += line["rows"]
    finally:
        log.close()
    return Done(files=tuple(done), rows=tuple(rows))


def _write(path: Path, items: Sequence[Item], progress: "_Progress") -> Row:
    stream = Stream(path, [entry for item in items for entry in item.entries])
    rows = []
    try:
        for item in items:
            rows.append(item.write(stream))
            progress.add(item.size_bytes)
        written = stream.close()
    finally:
        stream.abandon()
    for item, row in zip(items, rows, strict=True):
        for key, entry in zip(("sha256", "scales_sha256"), item.entries, strict=False):
            row.setdefault(key, written.tensors[entry.name].sha256)
        row |= {"file": path.name, "bytes": item.size_bytes}
    return {"file": asdict(written), "rows": rows}


def _require_room(working: Path, needed: int, out: Path) -> None:
    free = shutil.disk_usage(working).free
    if free < needed:
        raise OSError(None, f"{needed:,} bytes to write, {free:,} free on the disk")


class _Progress:
    """Says every so often how far it is."""

    def __init__(self, total: int, say: Say) -> None:
        self._total, self._say = total, say
        self._before, self._done = 0, 0
        self._begun = self._said = time.monotonic()

    def skip(self, size: int) -> None:
        self._before += size

    def add(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now - self._said < LINE_S:
            return
        self._said = now
        rate = self._done / (now - self._begun)
        left_s = int((self._total - self._before - self._done) / rate)
        gigabytes = f"{(self._before + self._done) / 1e9:.1f} of {self._total / 1e9:.1f} GB"
        self._say(f"{gigabytes}  {rate / 1e6:.0f} MB/s  left {left_s // 60}:{left_s % 60:02d}")
