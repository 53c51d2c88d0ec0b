"""A supervisor of stand-in ranks in a process of its own: started, asked, and looked after for the tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = [sys.executable, "-S", str(Path(__file__).with_name("stand_in.py"))]
PATIENCE_S = 60
SUPERVISE = """
import sys
from launch import local
local.SETTLE_S, local.GRACE_S = float(sys.argv[1]), float(sys.argv[2])
BEFORE
code = local.run(sys.argv[4:], int(sys.argv[3]))
assert not {"torch", "numpy"} & set(sys.modules), "the supervisor is to be small"
sys.exit(code)
"""


class Case:
    """A folder, what the ranks noted there, and the supervisors started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        (folder / "temporary").mkdir()

    def start(
        self, size: int, *acts: str, settle_s: float = 0.5, grace_s: float = 0.5, before: str = ""
    ) -> subprocess.Popen[str]:
        """A supervisor of stand-ins, at the head of a session of its own as a terminal's. before: code for it."""
        words = [
            SUPERVISE.replace("BEFORE", before),
            str(settle_s),
            str(grace_s),
            str(size),
            *STAND_IN,
            str(self.folder),
            *acts,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder / "temporary")}
        process = subprocess.Popen(
            [sys.executable, "-c", *words],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, size: int, *acts: str, **options: Any) -> tuple[int, str, str]:
        """Exit code and what was written."""
        process = self.start(size, *acts, **options)
        process.wait(timeout=PATIENCE_S)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err

    def facts(self, size: int) -> list[dict[str, Any]]:
        """What each rank noted, once all have."""
        files = [self.folder / f"rank-{rank}.json" for rank in range(size)]
        wait_until(lambda: all(file.exists() for file in files))
        return [json.loads(file.read_text()) for file in files]

    def signals(self, rank: int) -> list[str]:
        file = self.folder / f"rank-{rank}.signals"
        return file.read_text().split() if file.exists() else []

    def kept(self) -> list[str]:
        """What lies in the temporary folder."""
        return sorted(path.name for path in (self.folder / "temporary").rglob("*") if path.is_file())

    def processes(self) -> list[int]:
        """Those that the ranks noted and that are still there."""
        noted = [json.loads(file.read_text()) for file in self.folder.glob("rank-*.json")]
        return [number for one in noted for number in (one["pid"], one.get("helper", 0)) if number and is_there(number)]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def state(process: int) -> str:
    """As ps shows it: T stopped, Z ended and not yet waited for; "" where there is none."""
    if Path("/proc/self/stat").exists():
        return (_facts_of(process) or [""])[0]
    command = ["ps", "-o", "state=", "-p", str(process)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()[:1]


def children_of(process: int) -> list[int]:
    """The processes that it has started, in that order as long as numbers grow; on Linux."""
    numbers = sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [number for number in numbers if _facts_of(number)[1:2] == [str(process)]]


def _facts_of(process: int) -> list[str]:
    """What /proc/N/stat says from the state on: state, parent, ...; nothing where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_there(process: int) -> bool:
    return state(process) not in ("", "Z")
