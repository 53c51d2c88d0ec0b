"""A run's processes on this machine: started, signals passed on to them, all ended when one fails, the cause on top.

The process that does this needs no torch. Rank 0 has its stdout and stderr; what the others write goes to files in a
temporary folder, which is kept where one of the ranks has failed. On Linux the ranks die with it, whatever ends it;
elsewhere they stay if it is killed (SIGKILL), and must be ended by hand.
"""

import contextlib
import ctypes
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from signal import Signals

from launch.main import checkout

SETTLE_S = 2.0
"""After one has failed the others have so long to end by themselves: they may be about to say why (ours)."""
GRACE_S = 5.0
"""And then so long between SIGTERM and SIGKILL (ours)."""
TAIL_LINES = 20
TAIL_BYTES = 1 << 16
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a rank that was asked to stop and has saved."""
USER_ERROR = 2
HOST = "127.0.0.1"
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
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


def start(words: Sequence[str], size: int) -> int:
    """Run `keel WORDS` as `size` ranks until all have ended; returns the exit code of all together."""
    return run([sys.executable, "-c", START, str(checkout()), *words], size)


def run(command: Sequence[str], size: int) -> int:
    """As `start`, for any command that finds its place in the environment (launch/placement.py)."""
    ranks = Ranks(Path(tempfile.mkdtemp(prefix="keel-ranks-")))
    with _signals_to(ranks.events.put), _reserved_port() as port:
        try:
            for rank in range(size):
                ranks.add(command, environment(os.environ, rank, size, port))
            ranks.wait()
        finally:
            ranks.send(Signals.SIGKILL)
    code, named = ranks.outcome()
    if named is not None:
        ranks.tell(named)
        return code
    shutil.rmtree(ranks.folder, ignore_errors=True)
    if ranks.is_interrupted:
        raise KeyboardInterrupt
    return code


def environment(given: Mapping[str, str], rank: int, size: int, port: int) -> dict[str, str]:
    """What a rank finds in its environment: ours, its place, one thread for each operation, no network but our own."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": HOST, "MASTER_PORT": port}
    defaults = {"OMP_NUM_THREADS": "1"}
    if sys.platform in LOOPBACK:
        # Else gloo takes the address that the machine's name has, where it has one.
        defaults["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    return defaults | dict(given) | {name: str(value) for name, value in place.items()}


class Ranks:
    """The processes. All that happens comes through `events`, one after the other: a signal, or a rank's end."""

    def __init__(self, folder: Path) -> None:
        """folder: for what ranks other than 0 write."""
        self.folder = folder
        self.events: queue.SimpleQueue[Signals | tuple[int, int]] = queue.SimpleQueue()
        self._children: list[subprocess.Popen[bytes]] = []
        self._ended: dict[int, int] = {}
        """Codes as subprocess gives them, -n for signal n, in the order in which the ranks ended."""
        self._failed: list[int] = []
        """Ranks that failed before we ended any."""
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
                event = self.events.get(timeout=max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
            except queue.Empty:
                self._ending = True
                self.send(self._due.pop(0)[1])
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

    def outcome(self) -> tuple[int, int | None]:
        """The exit code of all together, and the rank to name as the cause where one has failed."""
        first = next((rank for rank, code in self._ended.items() if code), None)
        if first is None:
            return 0, None
        if self._asked is not None and self._ended[first] in (*STOPPED, -self._asked):
            # That was asked for, in a rank that does not train yet by the signal itself; others may have lost it then.
            return 128 + self._asked, None
        failed = self._failed
        if not failed:
            return 128 + self._asked if self._asked else self._code(first), None
        if self._ended[0] == USER_ERROR and 0 in failed:
            return USER_ERROR, None
        # A rank may end without a word because all of them have agreed to, and leave the words to another.
        named = next((rank for rank in failed if rank == 0 or self._ended[rank] < 0 or self._tail(rank)), failed[0])
        return self._code(named), named

    def tell(self, rank: int) -> None:
        """Say that a rank is the cause, and what it wrote last; rank 0 has said that itself."""
        code = self._ended[rank]
        name = f" ({Signals(-code).name})" if code < 0 else ""
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        lines = [f"{clear}keel: rank {rank} ended with {self._code(rank)}{name}", *self._tail(rank)]
        print(*lines, f"keel: what ranks other than 0 wrote is in {self.folder}", sep="\n", file=sys.stderr, flush=True)

    def _watch(self, rank: int, child: "subprocess.Popen[bytes]") -> None:
        self.events.put((rank, child.wait()))

    def _note_end(self, rank: int, code: int) -> None:
        self._ended[rank] = code
        if code in (0, *STOPPED) or self._ending:
            return
        self._failed.append(rank)
        if not self._due:
            # A user's mistake is the same on all ranks, and said.
            end = time.monotonic() + (0.0 if (rank, code) == (0, USER_ERROR) else SETTLE_S)
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
        """The last lines of a rank's stderr, where that is ours to show."""
        if rank == 0:
            return []
        with (self.folder / f"rank-{rank}.stderr").open("rb") as file:
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


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that rank 0 can listen on and nobody else is given.

    Bound here and not listened on: so the system hands it to no other process, while on Linux rank 0 may bind it, too,
    for both allow it (SO_REUSEADDR). Elsewhere it must be free for that, and only was so a moment ago.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port


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
