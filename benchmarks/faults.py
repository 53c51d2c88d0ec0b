"""Faults for benchmarks.failures and its tests, planted from outside: in a rank of a run, in a step, in one attempt.

    python -m benchmarks.faults JSON WORDS ...      `keel WORDS`, one rank of which has the fault

JSON: {"fault": NAME, "rank": N, "step": N, "row": N, "attempts": [N, ...], "after_s": S, "told": FILE}; row: of those
that the rank computes; after_s: kill and stop come then, wherever the rank is; told: gets the time of the fault.
Nothing in the product knows of this file: it changes functions of the ranks before they begin.
"""

import errno
import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

FAULTS = (
    "kill", "stop", "forward", "backward", "nan", "memory", "disk", "port", "slow", "deadlock",
)  # fmt: skip
SLOW_S = 0.15
"""What the slow rank loses in each row."""
BUG = "a bug that was planted"
_HELD: list[socket.socket] = []
RANK = "from benchmarks.faults import rank; rank()"


def supervise(fault: dict[str, Any], words: list[str]) -> int:
    """`keel WORDS`, whose ranks find the fault."""
    from launch import local
    from launch.main import main

    def command_of(words: list[str]) -> list[str]:
        start = f"import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); {RANK}"
        return [sys.executable, "-c", start, json.dumps(fault), *words]

    local.command_of = command_of
    return main(words)


def rank() -> None:
    """One rank: plants what is meant for it, then is the rank that it would have been."""
    fault = json.loads(sys.argv.pop(1))
    here, attempt = int(os.environ["RANK"]), int(os.environ["KEEL_ATTEMPT"])
    if here == fault["rank"] and attempt in fault.get("attempts", [0]):
        _plant(fault)
    from launch.main import main
    from trainer import machine

    machine.SECONDS = 0.001
    sys.exit(main())


def _plant(fault: dict[str, Any]) -> None:
    kind = fault["fault"]
    if "after_s" in fault:
        timer = threading.Timer(fault["after_s"], lambda: _happen(fault))
        timer.daemon = True
        timer.start()
        return
    if kind == "port":
        _tell(fault)
        _take_port()
        return
    from trainer import loop, row

    there, rows = [False], [0]
    take, forward, learned = loop.train_step, row.forward, row.sums

    def take_step(parts: Any, plan: Any, *rest: Any, **options: Any) -> Any:
        there[0], rows[0] = plan.step + 1 == fault["step"], 0
        if there[0] and kind == "disk":
            _tell(fault)
            _fill_disk()
        return take(parts, plan, *rest, **options)

    def forward_with_fault(*given: Any, **options: Any) -> Any:
        if kind == "slow":
            time.sleep(SLOW_S)
        if not there[0] or not _is_due(rows, fault):
            return forward(*given, **options)
        if kind in IN_FORWARD:
            _happen(fault)
        passed = forward(*given, **options)
        if kind == "backward":
            _tell(fault)
            _raise_in_backward(passed)
        return passed

    def sums_with_fault(*given: Any) -> Any:
        found = learned(*given)
        if kind == "nan" and there[0] and rows[0] > fault["row"]:
            there[0] = False
            _tell(fault)
            return replace(found, balance_L=(math.nan, *found.balance_L[1:]))
        return found

    loop.train_step, row.forward, row.sums = take_step, forward_with_fault, sums_with_fault


def _happen(fault: dict[str, Any]) -> None:
    _tell(fault)
    IN_FORWARD[fault["fault"]]()


def _tell(fault: dict[str, Any]) -> None:
    if "told" in fault:
        Path(fault["told"]).write_text(str(time.time()))


def _is_due(rows: list[int], fault: dict[str, Any]) -> bool:
    rows[0] += 1
    return rows[0] == fault["row"] + 1


def _bug() -> None:
    raise RuntimeError(BUG)


def _memory() -> None:
    """A limit that the next large array meets."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 26), resource.RLIM_INFINITY))
    import torch

    torch.empty(1 << 30).fill_(1)


def _deadlock() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


IN_FORWARD: dict[str, Callable[[], Any]] = {
    "forward": _bug,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "memory": _memory,
    "deadlock": _deadlock,
}


def _raise_in_backward(passed: Any) -> None:
    def hook(grad: Any) -> None:
        raise RuntimeError(BUG)

    ends = [end for end in (passed.end, passed.output.x_BTND) if end is not None and end.requires_grad]
    for end in ends[:1]:
        end.register_hook(hook)


def _fill_disk() -> None:
    """From now on this rank's checkpoints find no room."""
    from trainer import shard

    def full(*given: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shard.write = full


def _take_port() -> None:
    """As if another process listened where the ranks are to meet."""
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("0.0.0.0", int(os.environ["MASTER_PORT"])))
    taken.listen()
    _HELD.append(taken)


if __name__ == "__main__":
    sys.exit(supervise(json.loads(sys.argv[1]), sys.argv[2:]))
