"""`keel sample RUN`: text from a run's newest checkpoint."""

import json

from launch import arguments
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
  --json             one JSON object with prompt and text
"""
FLAGS = {"--prompt": str, "--tokens": int, "--temperature": float, "--top-p": float, "--seed": int, "--json": bool}


def main(argv: list[str]) -> int:
    """Print a sample."""
    given = arguments.parse(argv, FLAGS, USAGE)
    if len(given.words) != 1:
        raise ValueError(f"RUN = {' '.join(given.words)}: expected one run folder or name")
    folder = find_run(given.words[0])
    from launch.compose import read

    config = read(folder / CONFIG_FILE)
    from trainer.sample import sample_run

    options = {
        flag.removeprefix("--").replace("-", "_"): value
        for flag, value in given.flags.items()
        if value is not None and flag != "--json"
    }
    text = sample_run(folder, config, **options)
    print(json.dumps({"run": str(folder), **options, "text": text}) if given.flags["--json"] else text)
    return 0
