"""How the benchmarks' tests run one: as a program, and what it prints as tables."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT


def run(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A benchmark with these arguments, each of its processes with one thread."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of each table that begins with the column "layout", by column; an empty line ends it."""
    found: list[list[dict[str, str]]] = []
    heading: list[str] | None = None
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if cells[0] == "layout":
            heading = cells
            found.append([])
        elif heading is not None and line:
            found[-1].append(dict(zip(heading, cells, strict=True)))
        else:
            heading = None
    return found
