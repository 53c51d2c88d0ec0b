"""`keel test`: the tests with pytest, and with --all the style, import and type checks before them."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.main import checkout

HELP = "run the tests; --all also the slow ones, style, imports and types"
USAGE = f"""
keel test [--all] [words for pytest ...]

{HELP}.
Two workers with one thread each; everything else is handed to pytest, e.g. keel test tests/launch -k origin
"""
WORKERS = "2"
SUMMARY = re.compile(r"=*\s*((?:\d+ \w+|no tests ran)(?:, \d+ \w+)* in [\d.]+s.*?)\s*=*")


def main(argv: list[str]) -> int:
    """Run the tests; returns pytest's exit code, or 1 if only another check failed."""
    if "--help" in argv or "-h" in argv:
        print(USAGE.strip())
        return 0
    if importlib.util.find_spec("pytest") is None:
        raise ValueError("pytest = not installed: expected the tools of the `dev` extra; ./keel test installs them")
    root = checkout()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    results = {name: _run(name, command, root) for name, command in checks().items()} if "--all" in argv else {}
    code, summary = _pytest(argv, root, environment)
    if results:
        print("keel test:", ", ".join(f"{name} {'ok' if good else 'FAILED'}" for name, good in results.items()))
    print(f"keel test: {summary}", flush=True)
    return code or int(not all(results.values()))


def checks() -> dict[str, list[str]]:
    """The checks beside pytest, by name, as command lines."""
    scripts = Path(sysconfig.get_path("scripts"))
    ruff, suffix = [sys.executable, "-m", "ruff"], ".exe" if os.name == "nt" else ""
    return {
        "ruff check": [*ruff, "check", "."],
        "ruff format": [*ruff, "format", "--check", "."],
        "lint-imports": [str(scripts / f"lint-imports{suffix}"), "--no-logo"],
        "pyrefly": [str(scripts / f"pyrefly{suffix}"), "check", "--python-interpreter-path", sys.executable],
    }


def pytest_words(argv: Sequence[str]) -> list[str]:
    """pytest's command line: ours, unless the user says how many workers or none."""
    chosen = any(word.startswith(("-n", "--numprocesses")) or word == "no:xdist" for word in argv)
    color = ["--color=yes"] if sys.stdout.isatty() else []
    return [sys.executable, "-m", "pytest", *([] if chosen else ["-n", WORKERS, "--dist", "worksteal"]), *color, *argv]


def summary_of(lines: Sequence[str]) -> str:
    """pytest's own last word, e.g. "312 passed, 4 skipped in 63.10s", without colours and rules."""
    for line in reversed(lines):
        found = SUMMARY.fullmatch(re.sub(r"\x1b\[[\d;]*m", "", line).strip())
        if found:
            return found[1]
    return "pytest gave no summary"


def _run(name: str, command: Sequence[str], root: Path) -> bool:
    print(f"keel test: {name}", flush=True)
    return subprocess.run(command, cwd=root, check=False).returncode == 0


def _pytest(argv: Sequence[str], root: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    lines: list[str] = []
    with subprocess.Popen(
        pytest_words(argv),
        cwd=root,
        env=environment,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, summary_of(lines)
