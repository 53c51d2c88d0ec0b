"""A run's processes on this machine: started, signals passed on to them, all ended when one fails, the cause on top.

The process that does this needs no torch. Rank 0 has its stdout and stderr; what the others write goes to files in a
temporary folder, and on to the run's `logs/` where one of the ranks has failed (docs/failures.md). On Linux the ranks
die with it, whatever ends it; elsewhere they stay if it is killed (SIGKILL), and must be ended by hand.
"""

import contextlib
import ctypes
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from launch.main import checkout
from launch.meeting import environment, reserved_port
from launch.placement import ATTEMPT, FOLDER
from launch.watch import Cause, Watch, first_failure, keep, together
from trainer.ranks import Rank, of_row

SETTLE_S = 2.0
"""After one has failed the others have so long to end by themselves: they may be about to say why (ours)."""
GRACE_S = 5.0
"""And then so long between SIGTERM and SIGKILL (ours)."""
LOOK_S = 0.5
"""How often the ranks' beats are looked at (ours)."""
TAIL_LINES = 20
TAIL_BYTES = 1 << 16
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a rank that was asked to stop and has saved."""
USER_ERROR = 2
PR_SET_PDEATHSIG = 1
"""prctl(2)."""
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]\n"
    "from launch.main import main; sys.exit(main())"
)
"""Until a rank trains Ctrl-C ends it at once: Python would wait for torch to return, and torch for the other ranks.

The path as `./keel` has it: the working folder, which `python -m` would put first, may have a folder `data` of its own.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How an attempt ended. cause: None where nothing has failed, or a user's mistake; run: its folder, if known."""

    code: int
    cause: Cause | None
    run: Path | None
    logs: Path


def command_of(words: Sequence[str]) -> list[str]:
    """What starts a rank of `keel WORDS`."""
    return [sys.executable, "-c", START, str(checkout()), *words]


def run(command: Sequence[str], size: int) -> int:
    """Run a command that finds its place in the environment (launch/placement.py) as ranks, once; say what failed."""
    return attempt(command, size).code


def attempt(command: Sequence[str], size: int, number: int = 0, *, is_last: bool = True) -> Ended:
    """Run all ranks until they have ended. is_last: none will follow, so a rank's last lines are shown, too."""
    ranks = Ranks(Path(tempfile.mkdtemp(prefix="keel-ranks-")))
    with _signals_to(ranks.events.put), reserved_port() as port:
        try:
            for rank in range(size):
                own = {ATTEMPT: str(number), FOLDER: str(ranks.folder)}
                ranks.add(command, environment(os.environ, rank, size, port) | own)
            ranks.wait()
        finally:
            ranks.send(Signals.SIGKILL)
    code, cause = ranks.outcome()
    known, logs = ranks.watch.run(), ranks.folder
    if cause is not None:
        lines = ranks.words(cause) if is_last else []
        logs = keep(ranks.folder, known)
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        print(
            f"{clear}keel: {cause.line}", *lines, f"keel: what the ranks wrote is in {logs}", sep="\n", file=sys.stderr
        )
        sys.stderr.flush()
    else:
        shutil.rmtree(ranks.folder, ignore_errors=True)
    if ranks.is_interrupted:
        raise KeyboardInterrupt
    return Ended(code=code, cause=cause, run=known, logs=logs)


class Ranks:
    """The processes. All that happens comes through `events`, one after the other: a signal, or a rank's end."""

    def __init__(self, folder: Path) -> None:
        """folder: for what ranks other than 0 write."""
        self.folder = folder
        self.events: queue.SimpleQueue[Signals | tuple[int, int]] = queue.SimpleQueue()
        self._children: list[subprocess.Popen[bytes]] = []
        self._ended: dict[int, int] = {}
        """Codes as subprocess gives them, -n for signal n, in the order in which the ranks ended."""
        self._failed: list[tuple[int, int, float]] = []
        """Ranks that failed before we ended any, their codes, and when, on the wall clock."""
        self.watch = Watch(folder)
        self._hung: list[str] = []
        self._asked: Signals | None = None
        self._due: list[tuple[float, Signals]] = []
        self._ending = False

    def add(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the next rank."""
        names = [f"rank-{len(self._children)}.{stream}" for stream in ("stdout", "stderr")] if self._children else []
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context((self.folder / name).open("wb")) for name in names]
            out, err = files or (None, None)
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                # A group of its own: a terminal's Ctrl-C reaches us only, and is passed on once.
                process_group=0,
                preexec_fn=_dying_with_us(),
            )
        self._children.append(child)

    def wait(self) -> None:
        """Until all have ended: the others of one that failed, by themselves or by our signals."""
        for rank, child in enumerate(self._children):
            # From here on, since starting a process copies a single thread only.
            threading.Thread(target=self._watch, args=(rank, child), daemon=True).start()
        while len(self._ended) < len(self._children):
            try:
                event = self.events.get(timeout=max(0.0, self._due[0][0] - time.monotonic()) if self._due else LOOK_S)
            except queue.Empty:
                self._look()
                continue
            if isinstance(event, tuple):
                self._note_end(*event)
            else:
                self._pass_on(event)

    def send(self, number: Signals) -> None:
        """A signal to those that have not ended; SIGKILL also to what they have started."""
        for rank, child in enumerate(self._children):
            if rank in self._ended:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number) if number is Signals.SIGKILL else os.kill(child.pid, number)

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C has ended the first rank before it could say so."""
        return self._asked is Signals.SIGINT and self._ended[0] == -Signals.SIGINT

    def outcome(self) -> tuple[int, Cause | None]:
        """The exit code of all together, and the cause where something has failed."""
        first = next((rank for rank, code in self._ended.items() if code), None)
        if first is None:
            return 0, None
        if self._asked is not None and self._ended[first] in (*STOPPED, -self._asked):
            # That was asked for, in a rank that does not train yet by the signal itself; others may have lost it then.
            return 128 + self._asked, None
        beats = self.watch.beats()
        if self._hung:
            step = min((one.step for one in beats.values() if one.step), default=None)
            return 1, Cause(rank=None, line="the run hangs: " + "\n      ".join(self._hung), step=step, code=1)
        # Some may have failed and not found their end before we ended them.
        noted = [(rank, 1, one.time) for rank, one in beats.items() if one.failed]
        failed = self._failed or noted
        if not failed:
            return 128 + self._asked if self._asked else self._code(first), None
        if self._ended[0] == USER_ERROR and 0 in [rank for rank, *_ in failed]:
            return USER_ERROR, None
        # Of those that agreed, some may not have ended before we ended them.
        agreed = together({rank for rank, *_ in (*self._failed, *noted)}, len(self._children), beats)
        if agreed:
            whose = of_row(list(beats.values()), beats[0].row) if beats[0].row else []
            of = f"; that row is of {', '.join(one.name for one in whose)}" if whose else ""
            line = f"all ranks ended together: {agreed}{of}"
            return 1, Cause(rank=None, line=line, step=beats[0].step, code=1)
        # A rank may end without a word because all of them have agreed to, and leave the words to another.
        spoken = [one for one in failed if one[0] == 0 or one[1] < 0 or one[0] in beats or self._tail(one[0])]
        rank = first_failure(spoken or failed, beats)
        return self._cause_of(rank, beats.get(rank))

    def _cause_of(self, rank: int, beat: Rank | None) -> tuple[int, Cause]:
        ended = self._ended[rank] if rank in [one for one, *_ in self._failed] else 1
        code, name = (ended, "") if ended >= 0 else (128 - ended, f" ({Signals(-ended).name})")
        line = f"{beat.name if beat else f'rank {rank}'} ended with {code}{name}"
        if beat is not None:
            line += f" in {beat.where}" + (f": {beat.failed['error']}" if beat.failed and ended >= 0 else "")
        return code, Cause(rank=rank, line=" ".join(line.split()), step=beat.step if beat else None, code=code)

    def words(self, cause: Cause) -> list[str]:
        """What a rank that is the cause wrote last; rank 0 has said that itself."""
        return self._tail(cause.rank) if cause.rank is not None else []

    def _look(self) -> None:
        """Nothing has happened for a while: the next signal that is due; else whether the ranks still come on."""
        if self._due:
            if time.monotonic() >= self._due[0][0]:
                self._ending = True
                self.send(self._due.pop(0)[1])
            return
        alive = {rank: child.pid for rank, child in enumerate(self._children) if rank not in self._ended}
        if any(one.failed for one in self.watch.beats().values()):
            self._end_in(SETTLE_S)
        elif not self._asked:
            self._hung = self.watch.hung(alive)
            if self._hung:
                self._ending = True
                self.send(Signals.SIGKILL)

    def _watch(self, rank: int, child: "subprocess.Popen[bytes]") -> None:
        self.events.put((rank, child.wait()))

    def _note_end(self, rank: int, code: int) -> None:
        self._ended[rank] = code
        if code in (0, *STOPPED) or self._ending:
            return
        self._failed.append((rank, code, time.time()))
        if not self._due:
            # A user's mistake is the same on all ranks, and said.
            self._end_in(0.0 if (rank, code) == (0, USER_ERROR) else SETTLE_S)

    def _end_in(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._due = [(end, Signals.SIGTERM), (end + GRACE_S, Signals.SIGKILL)]

    def _pass_on(self, number: Signals) -> None:
        """Ctrl-C and SIGTERM once; a second Ctrl-C kills. Ctrl-Z stops the ranks with us, until we go on."""
        if number is Signals.SIGTSTP:
            self.send(Signals.SIGSTOP)
            os.kill(os.getpid(), Signals.SIGSTOP)
            self.send(Signals.SIGCONT)
        elif self._asked is None:
            self._asked = number
            self.send(number)
        elif number is Signals.SIGINT:
            self._ending = True
            self.send(Signals.SIGKILL)

    def _code(self, rank: int) -> int:
        code = self._ended[rank]
        return code if code >= 0 else 128 - code

    def _tail(self, rank: int) -> list[str]:
        """The last lines of a rank's stderr, where that is in a file."""
        path = self.folder / f"rank-{rank}.stderr"
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return [f"    {line}" for line in lines[-TAIL_LINES:]]


@contextlib.contextmanager
def _signals_to(put: Callable[[Signals], None]) -> Iterator[None]:
    """Within the block what asks a process to stop is an event; the old handlers are put back after it."""
    # Whoever started us may want the last two ignored, as nohup does.
    own = [number for number in (Signals.SIGTSTP, Signals.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    wanted = (Signals.SIGINT, Signals.SIGTERM, *own)
    old = {number: signal.signal(number, lambda received, frame: put(Signals(received))) for number in wanted}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _dying_with_us() -> Callable[[], None] | None:
    """For a child to call before it becomes its program: on Linux it is killed when this process ends."""
    if sys.platform != "linux":
        return None
    prctl, us = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != us:
            os._exit(1)

    return ask
