"""What the benchmarks share: the heading of a result, a table, and medians of interleaved repetitions."""

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from trainer import provenance


def heading(module: str, shapes: str, device: str = "cpu") -> str:
    """How to make the result again, on what it was made, and how busy that machine was."""
    facts = provenance.facts(device=device, dtype="fp32")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return "\n".join(
        [
            f"command   OMP_NUM_THREADS={threads} .venv/bin/python -m {module} {shlex.join(sys.argv[1:])}".rstrip(),
            f"device    {facts['device_name']}, {os.cpu_count()} cores, {platform.machine()} {facts['cpu_capability']}",
            f"versions  python {facts['python']}, torch {facts['torch']}, numpy {facts['numpy']}, keel {facts['keel']}",
            f"load      {os.getloadavg()[0]:.1f} at the end (processes that wanted a core, this one among them)",
            f"shapes    {shapes}",
        ]
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def interleaved(actions: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each action; every repetition runs all of them in turn, so that a busy minute hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repetitions):
        for name, action in actions.items():
            seconds[name].append(timed(action))
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
