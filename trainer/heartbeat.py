"""What a rank is doing, told in a small file that others read: who starts ranks, `keel status`, and a rank that waits.

The main thread marks where it is. A thread beside it writes that it is alive and, from the main thread's stack, whether
it waits for other ranks: so whatever speaks through torch.distributed is seen, without a word in the code that does.
The share of such looks that found it waiting gives the rank's own work in a step. A file that cannot be written ends
no run.
"""

import contextlib
import json
import linecache
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.parallel.placement import SINGLE, Placement

LOOK_S = 0.1
SHARED_S = 1.0
"""How often a look is taken, and how often the run's folder, which may be far away, is told (both ours)."""
BYTES = 2048
"""A file's size, whatever it says: written over in one piece, it needs no room on a full disk."""
FIRST_S, LEAST_S, TIMES, KNOWN = 600.0, 60.0, 10, 3
"""How long the same phase may last: FIRST_S until it was seen KNOWN times, then TIMES its longest, at least LEAST_S.

A patience that was set holds for phases that were seen before: the first of each may load parts of torch, for example.
"""
START = ("starting", "reading", "building", "restoring")
NAMED = 16
"""So many of the ranks that another waits for are told (ours)."""
WINDOW_S = 30.0
"""Own work is the mean over the last steps that took so long together."""
BLOCKED = ("threading.py", "concurrent/futures/_base.py", "torch/autograd/graph.py")
"""Where the main thread stands while another thread of its process speaks for it."""
OWN = tuple(f"{os.sep}{floor}{os.sep}" for floor in ("trainer", "model", "optim", "data"))


class Beat:
    """One rank's heart. Without `start` nothing is written and nothing looks: marks cost nothing then."""

    def __init__(self, place: Placement = SINGLE, where: str = "", patience_s: float = 0.0) -> None:
        """where: the rank's coordinates, for people. patience_s: replaces the limits that are learned; 0 does not."""
        self.place = place
        self._patience_s = patience_s
        self._told: dict[str, Any] = {
            "rank": place.rank, "size": place.size, "place": where, "pid": os.getpid(), "attempt": place.attempt,
            "count": 0, "doing": "starting",
        }  # fmt: skip
        self._lock, self._over = threading.Lock(), threading.Event()
        self._paths: list[Path] = []
        self.shared: Path | None = None
        """The folder of all ranks' beats in that of the run, once it is known."""
        self._age_s, self._longest = 0.0, dict[str, tuple[int, float]]()
        self._in_step, self._own_s, self._all_s = False, 0.0, 0.0
        self._steps: deque[tuple[float, float]] = deque()
        self._main = threading.main_thread().ident or 0

    def start(self) -> None:
        """Begin to beat; in the folder of whoever started this rank, if that watches."""
        if self.place.folder:
            self._paths = [Path(self.place.folder) / file_name(self.place.rank)]
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def follow(self, run: Path) -> None:
        """Beat in a run's folder too from now on, and tell who started the ranks which run it is."""
        with contextlib.suppress(OSError):
            (run / "ranks").mkdir(exist_ok=True)
            self.shared = run / "ranks"
            if self.place.rank == 0 and self.place.folder:
                (Path(self.place.folder) / "run").write_text(str(run.absolute()))
        self._write(shared=True)

    def mark(self, doing: str, **more: Any) -> None:
        """Something else begins, or the same once more."""
        with self._lock:
            times, longest = self._longest.get(self._told["doing"], (0, 0.0))
            self._longest[self._told["doing"]] = times + 1, max(longest, self._age_s)
            self._told |= {"doing": doing, **more}
            self._age_s = 0.0
            self._in_step = self._in_step and doing not in ("validation", "saving", "ending")
        if self._paths:
            self._write(shared=False)

    def step(self, step: int, rows: int) -> None:
        """A step begins, counted from 1; the one before it has ended."""
        with self._lock:
            if self._all_s:
                self._steps.append((self._own_s, self._all_s))
                self._own_s = self._all_s = 0.0
            while len(self._steps) > 1 and sum(all_s for _, all_s in self._steps) - self._steps[0][1] > WINDOW_S:
                self._steps.popleft()
        self.mark("step", step=step, rows=rows, row=None)
        self._in_step = True

    def row(self, doing: str, row: int | None) -> None:
        """Row `row` of the step, counted from 0; None where this rank helps others with theirs."""
        self.mark(doing, row=None if row is None else row + 1)

    def fail(self, error: BaseException) -> None:
        """Note why this rank ends. Where it only lost another, its words no longer go to the terminal if watched."""
        if "failed" in self._told or isinstance(error, SystemExit | KeyboardInterrupt):
            return
        follows = is_loss(error)
        fault = getattr(error, "fault", None)
        with self._lock:
            if fault is not None:
                self._told |= {"row": fault.index + 1}
            text = f"{type(error).__name__}: {error}".strip()[:400]
            self._told["failed"] = {"time": time.time(), "error": text, "follows": follows}
        self._write(shared=True)
        if follows and self.place.folder and self.place.rank == 0:
            with contextlib.suppress(OSError), (Path(self.place.folder) / "rank-0.stderr").open("ab") as file:
                sys.stderr.flush()
                os.dup2(file.fileno(), 2)

    def close(self) -> None:
        """The last beat."""
        self._over.set()
        self._write(shared=True)

    def _run(self) -> None:
        last, shared_s = time.monotonic(), 0.0
        while not self._over.wait(LOOK_S):
            now = time.monotonic()
            # While the whole process is stopped nothing that it does takes longer.
            passed, last = min(now - last, 10 * LOOK_S), now
            shared_s += passed
            self._look(passed)
            self._write(shared=shared_s >= max(SHARED_S, self.place.size / 100))
            shared_s = 0.0 if shared_s >= max(SHARED_S, self.place.size / 100) else shared_s

    def _look(self, passed: float) -> None:
        frames = sys._current_frames()
        main = frames.get(self._main)
        exchange, at = look(main, self.place.size)
        if exchange is None and main is not None and main.f_code.co_filename.endswith(BLOCKED):
            others = (frame for ident, frame in frames.items() if ident not in (self._main, threading.get_ident()))
            exchange = next(filter(None, (look(frame, self.place.size)[0] for frame in others)), None)
        with self._lock:
            self._age_s += passed
            self._told |= {"exchange": exchange, "at": at}
            if self._in_step:
                self._all_s += passed
                self._own_s += 0.0 if exchange else passed

    def _record(self) -> bytes:
        with self._lock:
            told = self._told
            told["count"] += 1
            all_s = sum(all_s for _, all_s in self._steps)
            times, longest = self._longest.get(told["doing"], (0, 0.0))
            learned = FIRST_S if times < KNOWN else max(LEAST_S, TIMES * longest)
            if told["doing"] in START:
                learned = max(self._patience_s, FIRST_S)
            elif self._patience_s:
                learned = self._patience_s if times else max(self._patience_s, LEAST_S)
            told |= {"time": time.time(), "age_s": round(self._age_s, 2), "limit_s": round(learned, 1)}
            told |= {"patience_s": self._patience_s, "seen_s": round(all_s, 1)}
            told["own_s"] = sum(own for own, _ in self._steps) / len(self._steps) if self._steps else None
            return json.dumps(told).encode().ljust(BYTES)

    def _write(self, *, shared: bool) -> None:
        paths = [*self._paths, *([self.shared / file_name(self.place.rank)] if shared and self.shared else [])]
        record = self._record() if paths else b""
        for path in paths:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                try:
                    os.pwrite(descriptor, record, 0)
                    os.ftruncate(descriptor, len(record))
                finally:
                    os.close(descriptor)


def file_name(rank: int) -> str:
    """The file of a rank, in whatever folder."""
    return f"rank-{rank}.beat"


def look(frame: FrameType | None, size: int) -> tuple[dict[str, Any] | None, str]:
    """What a thread waits for, the call and the ranks that it takes, or None; and the line of ours that it is in."""
    found, at = None, ""
    while frame is not None:
        name = frame.f_code.co_filename
        # The outermost function of torch's that is no decorator is the call that we made.
        if is_exchange(name, frame.f_lineno) and (found is None or name.endswith("distributed_c10d.py")):
            found = frame
        if not at and any(floor in name for floor in OWN) and "site-packages" not in name:
            at = f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    if found is None:
        return None, at
    in_torch = "torch/distributed" in found.f_code.co_filename
    call = found.f_code.co_name if in_torch else "exchange"
    with contextlib.suppress(Exception):
        return {"call": call, "ranks": list(_ranks(found.f_locals) if in_torch else range(size))[:NAMED]}, at
    return {"call": call, "ranks": list(range(size))[:NAMED]}, at


def _ranks(given: dict[str, Any]) -> Sequence[int]:
    """Those that a call of torch.distributed needs, by its arguments."""
    distributed = sys.modules["torch.distributed"]
    peer = given.get("dst", given.get("src"))
    # A reduction or a broadcast has an end, too, but needs the whole group.
    if isinstance(peer, int) and not {"async_op", "object_list", "op"} & given.keys():
        return [peer]
    return distributed.get_process_group_ranks(given.get("group") or distributed.group.WORLD)


def is_exchange(file: str, line: int) -> bool:
    """Whether a line speaks with other ranks: torch's own code for that, or ours or DeepSpeed's that waits for it."""
    if f"torch{os.sep}distributed{os.sep}" in file:
        return True
    waits = f"trainer{os.sep}parallel{os.sep}" in file or f"{os.sep}deepspeed{os.sep}" in file
    return waits and ".wait(" in linecache.getline(file, line)


def is_loss(error: BaseException) -> bool:
    """Whether a rank failed because another was gone or did not come: the error arose in an exchange."""
    if type(error).__name__ == "Lost":
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and is_exchange(trace.tb_frame.f_code.co_filename, trace.tb_lineno):
        return "address already in use" not in str(error).lower()
    return error.__cause__ is not None and is_loss(error.__cause__)
