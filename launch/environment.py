"""How the bootstrap makes an environment: one process at a time, step by step, with a line of progress for each.

For `keel` alone, and with the standard library alone: it runs before anything is installed.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

QUIET_S = 15
"""Without a terminal, a long step says after each of these that it is still at work."""
TAIL_LINES = 20
"""Lines of the log shown when a step fails."""


class SetupError(Exception):
    """The environment cannot be made; the text says what was expected and what to do."""


class Runner:
    """Runs the steps one after the other; their output goes to the log."""

    def __init__(self, log: Path, lock: int, steps: int) -> None:
        self.log, self.lock, self.steps, self.step = log, lock, steps, 0
        log.write_bytes(b"")

    def run(self, title: str, attempts: Sequence[Sequence[str]], expected: str) -> str:
        """The first attempt that succeeds; returns the last line of its output, raises SetupError if none does."""
        self.step += 1
        head, began = f"[{self.step}/{self.steps}] {title}", time.monotonic()
        for command in attempts:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"{head}\n")
            if self._succeeds(command, head):
                say(f"{head}: {time.monotonic() - began:.0f} s")
                return self._last_line()
        say(f"{head}: failed; the end of {self.log}:")
        sys.stderr.write("".join(f"    {line}\n" for line in self._lines()[-TAIL_LINES:]))
        raise SetupError(f"set-up = {title}: expected {expected}")

    def _succeeds(self, command: Sequence[str], head: str) -> bool:
        environment = {**os.environ, "DS_BUILD_OPS": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        # The child holds the lock too: if this process is killed, nobody else starts before pip has ended.
        held: dict[str, Any] = {} if os.name == "nt" else {"pass_fds": (self.lock,)}
        with self.log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=self.log.parent, **held)
        began = said_at = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=1) == 0
            now = time.monotonic()
            if sys.stderr.isatty() or now - said_at >= QUIET_S:
                say(f"{head}: {now - began:.0f} s  {self._last_line()[:60]}".rstrip(), passing=True)
                said_at = now

    def _lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _last_line(self) -> str:
        """What the running command said last; the log's own headings say nothing."""
        last = (self._lines() or [""])[-1]
        return "" if last.startswith("[") else last


def say(text: str, *, passing: bool = False) -> None:
    """One line on stderr; on a terminal the next line is written over a `passing` one."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[Kkeel: {text}{'' if passing else chr(10)}")
        sys.stderr.flush()
    else:
        print(f"keel: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the lock file, waiting while another process does; the system gives it back when all its holders end."""
    with path.open("w") as file:
        if not _lock(file.fileno(), wait=False):
            say("another process is setting up; waiting for it")
            _lock(file.fileno(), wait=True)
        yield file.fileno()


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> bool:
        while True:
            with contextlib.suppress(OSError):
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            if not wait:
                return False
            time.sleep(1)

else:
    import fcntl

    def _lock(descriptor: int, *, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
