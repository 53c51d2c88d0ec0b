"""`keel import FOLDER OUT`: a model in the released layout becomes weights that a run can begin at."""

import json
import sys
from pathlib import Path
from typing import Any

from launch import arguments, device

HELP = "turn a released model folder into weights that a run begins at"
USAGE = f"""
keel import FOLDER OUT [--json]

{HELP}: keel train init.weights=OUT ...
The weights are fp32, exactly what the codes say; the scales are kept beside them, so that keel export gives back every
byte that training did not touch. One tensor at a time, in parts; the same command goes on where it was broken off.

  FOLDER    config.json and *.safetensors under the released names: FP8 with packed FP4 experts, FP8 as in -Base, BF16
            or F32
  OUT       a new folder; OUT/report.jsonl has a line for each tensor
  --json    these lines and a summary on standard output
"""


def main(argv: list[str]) -> int:
    """Import a folder and say what was in it."""
    given = arguments.parse(argv, {"--json": bool}, USAGE)
    if len(given.words) != 2:
        raise ValueError(f"FOLDER OUT = {' '.join(given.words)}: expected a model's folder and a new folder")
    source, out = map(Path, given.words)
    device.prepare("cpu")
    from trainer.released.verbs import import_folder

    rows, summary = import_folder(source, out, say)
    show(rows, summary, as_json=given.flags["--json"])
    return 0


def say(line: str) -> None:
    """Progress, which is no result."""
    print(line, file=sys.stderr, flush=True)


def show(rows: tuple[dict[str, Any], ...], summary: dict[str, Any], *, as_json: bool) -> None:
    """The summary as a table, or everything as lines of JSON."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
        print(json.dumps({"summary": summary}))
        return
    width = max(map(len, summary))
    for key, value in summary.items():
        print(f"{key:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")
