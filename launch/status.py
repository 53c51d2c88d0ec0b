"""`keel status [RUN]`: where a run stands, once or as it goes on."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch import arguments
from launch.runs import find_run

if TYPE_CHECKING:
    from trainer.report.read import Folder, Run

HELP = "show where a run stands"
USAGE = f"""
keel status [RUN] [--follow] [--json]

{HELP}: steps, losses, speed, what is left, the last checkpoint, and anything that needs a look.

  RUN         a run's folder, or its name under runs/; the newest run where none is given
  --follow    go on until the run ends or Ctrl-C: redrawn every second on a terminal, else a line per step
  --json      one JSON object; with --follow one per step
"""
EVERY_S = 1.0


def main(argv: list[str]) -> int:
    """Print the status; returns 0 also for a run that failed: asking has worked."""
    given = arguments.parse(argv, {"--follow": bool, "--json": bool}, USAGE)
    if len(given.words) > 1:
        raise ValueError(f"RUN = {' '.join(given.words)}: expected one run's folder or name, or none")
    from trainer.report import terminal
    from trainer.report.read import Folder, newest

    folder = Folder(find_run(given.words[0]) if given.words else newest(Path("runs")))
    as_json, live = given.flags["--json"], sys.stdout.isatty() and not given.flags["--json"]
    colours = live and "NO_COLOR" not in os.environ

    def show(run: "Run") -> str:
        if as_json:
            return json.dumps(terminal.as_dict(run))
        return terminal.view(run, colours) if live or not given.flags["--follow"] else terminal.line(run)

    if not given.flags["--follow"]:
        print(show(folder.read()))
        return 0
    try:
        _follow(folder, show, live)
    except KeyboardInterrupt:
        print(end="\n" if live else "")
    return 0


def _follow(folder: "Folder", show: Callable[["Run"], str], live: bool) -> None:
    shown: tuple[str, int] | None = None
    while True:
        run = folder.read()
        if live:
            # Home, each line cleared to its end, then whatever is left of a longer picture: nothing flickers.
            clear = "\033[2J" if shown is None else ""
            print(f"{clear}\033[H" + show(run).replace("\n", "\033[K\n") + "\033[K\033[J", flush=True)
        elif shown != (run.state, run.step):
            print(show(run), flush=True)
        shown = run.state, run.step
        if run.state != "running":
            return
        time.sleep(EVERY_S)
