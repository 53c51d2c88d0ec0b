"""`keel sample RUN`: text from a run's newest checkpoint."""

import json
from dataclasses import replace

from launch import arguments, device
from launch.runs import CONFIG_FILE, find_run

HELP = "let a run's newest checkpoint write text"
USAGE = f"""
keel sample RUN [--prompt TEXT] [--tokens N] [--temperature X] [--top-p X] [--seed N] [--json]

{HELP}. What is not given is taken from the run's own configuration.

  RUN                a run's folder, or its name under runs/
  --prompt TEXT      the text to go on from
  --tokens N         how many tokens to write
  --temperature X    0 takes the likeliest token each time
  --top-p X          draw from the likeliest tokens that together have this probability
  --seed N           another seed, another text; the same seed, the same text
  --json             one JSON object with the settings and the text
"""
SETTINGS = {"--prompt": str, "--tokens": int, "--temperature": float, "--top-p": float}


def main(argv: list[str]) -> int:
    """Print a sample."""
    given = arguments.parse(argv, SETTINGS | {"--seed": int, "--json": bool}, USAGE)
    if len(given.words) != 1:
        raise ValueError(f"RUN = {' '.join(given.words)}: expected one run's folder or name")
    folder = find_run(given.words[0])
    from launch.compose import read

    config = read(folder / CONFIG_FILE)
    chosen = {flag[2:].replace("-", "_"): given.flags[flag] for flag in SETTINGS if given.flags[flag] is not None}
    config = replace(config, sample=replace(config.sample, **chosen))
    seed = config.seed if given.flags["--seed"] is None else given.flags["--seed"]
    device.prepare(config.device)
    from trainer.folder import RunFolder
    from trainer.sample import sample_run

    pieces = sample_run(config, RunFolder(folder), seed=seed)
    if given.flags["--json"]:
        print(json.dumps({"run": str(folder), "seed": seed, **chosen, "text": "".join(pieces)}))
        return 0
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
