"""`keel export SOURCE OUT`: weights of a run, a checkpoint or an import in the released layout."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from launch import arguments, device
from launch.runs import CONFIG_FILE, find_run

if TYPE_CHECKING:
    from trainer.released.verbs import Source

HELP = "write the weights of a run or an import as a released model folder"
USAGE = f"""
keel export SOURCE OUT [--format released|fp8|bf16|fp32] [--like FOLDER] [--step N] [--shard-bytes N] [--json]

{HELP}.
What training did not touch comes back byte by byte where its scales are known: of what a run began at
(init.weights), or of --like. One tensor at a time; the same command goes on where it was broken off.

  SOURCE           a run's folder or name, the folder of one of its checkpoints, or what keel import made
  OUT              a new folder; OUT/report.jsonl has a line for each tensor
  --format NAME    released: FP8 and packed FP4 experts; fp8: as -Base; bf16, fp32: for other tools. Default that of
                   an import, else released
  --like FOLDER    keep the scales of this import or released folder; --like none keeps none
  --step N         the checkpoint of this step; otherwise the newest that verifies
  --shard-bytes N  most bytes of a file, default 5000000000
  --json           the report and a summary on standard output
"""
COMMIT = "COMMIT"


def main(argv: list[str]) -> int:
    """Export and say what is exact."""
    flags = {"--format": str, "--like": str, "--step": int, "--shard-bytes": int, "--json": bool}
    given = arguments.parse(argv, flags, USAGE)
    if len(given.words) != 2:
        raise ValueError(f"SOURCE OUT = {' '.join(given.words)}: expected a run, checkpoint or import and a new folder")
    word, out = given.words
    shown = importlib.import_module("launch.import")
    device.prepare("cpu")
    from trainer.released.verbs import export_source

    rows, summary = export_source(
        _source(word, given.flags["--step"]),
        Path(out),
        shown.say,
        variant=given.flags["--format"],
        like=given.flags["--like"],
        shard_bytes=given.flags["--shard-bytes"],
    )
    shown.show(rows, summary, as_json=given.flags["--json"])
    return 0


def _source(word: str, step: int | None) -> "Source":
    """The checkpoint that is meant, and the configuration of its run where it has one."""
    from launch.compose import read
    from trainer.released.verbs import Source

    folder = Path(word)
    if not (word and (folder / COMMIT).is_file()):
        if word and (folder / "model.safetensors.index.json").is_file():
            raise ValueError(f"SOURCE = {word}: expected a run, a checkpoint or an import; keel import makes it one")
        run = find_run(word)
        return Source(run=run, config=read(run / CONFIG_FILE), step=step)
    if step is not None:
        raise ValueError(f"--step = {step}: expected none beside a checkpoint's own folder")
    file = folder.absolute().parent.parent / CONFIG_FILE
    return Source(checkpoint=folder, config=read(file) if file.is_file() else None)
