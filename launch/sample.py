"""`keel sample RUN`: text from a checkpoint of a run."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from launch import arguments, device
from launch.runs import CONFIG_FILE, find_run

if TYPE_CHECKING:
    from trainer.sample import Piece

HELP = "let a checkpoint of a run write text"
USAGE = f"""
keel sample RUN [--prompt TEXT ...] [--tokens N] [--temperature X] [--top-p X] [--seed N] [--step N] [--json]

{HELP}. What is not given is taken from the run's own configuration.

  RUN                a run's folder, or its name under runs/
  --prompt TEXT      the text to go on from; given several times, all are written at once
  --tokens N         how many tokens to write at most
  --temperature X    0 takes the likeliest token each time
  --top-p X          draw from the likeliest tokens that together have this probability
  --seed N           another seed, another text; the same seed, the same text
  --step N           the checkpoint of this step; otherwise the newest that verifies
  --json             one JSON object with the settings and the texts
"""
SETTINGS = {"--tokens": int, "--temperature": float, "--top-p": float}


def main(argv: list[str]) -> int:
    """Print a sample, one prompt's text as it is written, the others' in their turn."""
    flags = SETTINGS | {"--prompt": list, "--seed": int, "--step": int, "--json": bool}
    given = arguments.parse(argv, flags, USAGE)
    if len(given.words) != 1:
        raise ValueError(f"RUN = {' '.join(given.words)}: expected one run's folder or name")
    folder = find_run(given.words[0])
    from launch.compose import read

    config = read(folder / CONFIG_FILE)
    chosen = {flag[2:].replace("-", "_"): given.flags[flag] for flag in SETTINGS if given.flags[flag] is not None}
    sampling = replace(config.sample, **chosen)
    prompts = given.flags["--prompt"] or [sampling.prompt]
    seed = config.seed if given.flags["--seed"] is None else given.flags["--seed"]
    device.prepare(config.device)
    from trainer.folder import RunFolder
    from trainer.sample import sample_run

    run = RunFolder(folder)
    step, pieces = sample_run(config, run, prompts, sampling, seed=seed, at_step=given.flags["--step"])
    if not given.flags["--json"]:
        stream(pieces, len(prompts))
        return 0
    texts = [""] * len(prompts)
    for piece in pieces:
        texts[piece.row] += piece.text
    settings = {key: value for key, value in asdict(sampling).items() if key != "prompt"}
    print(json.dumps({"run": str(folder), "step": step, "seed": seed, **settings, "prompts": prompts, "texts": texts}))
    return 0


def stream(pieces: "Iterable[Piece]", rows: int) -> None:
    """Print the first row as it comes; each other is held until the row before has ended, then goes on as it comes.

    Of several rows each has a line "--- 1 of 3" above it.
    """
    held, ended, now = [""] * rows, set[int](), 0
    print(_border(now, rows), end="")
    for piece in pieces:
        held[piece.row] += piece.text
        ended |= {piece.row} if piece.last else set()
        print(held[now], end="", flush=True)
        held[now] = ""
        while now in ended and now + 1 < rows:
            now += 1
            print(_border(now, rows) + held[now], end="", flush=True)
            held[now] = ""
    for row in range(now + 1, rows):
        print(_border(row, rows) + held[row], end="")
    print()


def _border(row: int, rows: int) -> str:
    """The line above each of several texts; a single one stands alone."""
    if rows == 1:
        return ""
    return ("\n" if row else "") + f"--- {row + 1} of {rows}\n"
