"""`keel train`: compose a configuration and run it."""

import os

from launch import arguments, attempts, device
from launch.arguments import Arguments
from launch.runs import CONFIG_FILE, find_crash
from trainer.parallel.placement import SINGLE

HELP = "train a model: the debug recipe in minutes on a laptop, any other with recipe=NAME"
USAGE = f"""
keel train [--new] [--json] [KEY=VALUE ...]
keel train --replay CRASH [--json] [KEY=VALUE ...]

{HELP}.
The same command again continues an unfinished run; a finished one is left alone.
A layout of several processes (parallel=cpu4, or parallel.data=2 threads=1) starts them on this machine; torchrun and
whatever else sets RANK and WORLD_SIZE start them, too, on any number of machines.

  --new        start afresh beside earlier runs of the same configuration
  --json       progress as JSON lines on standard output
  --replay CRASH
               compute the row that a crash folder (RUN/crashes/step-000123) holds again, and say where it is not
               finite; with precision.dtype=fp32 in that precision
  KEY=VALUE    overrides, e.g. recipe=flash, model=small, schedule.rate.peak=1e-3 (keel config show lists all keys)
"""


def main(argv: list[str]) -> int:
    """Train; returns the exit code of the run."""
    words = arguments.parse(argv, {"--new": bool, "--json": bool, "--replay": str}, USAGE)
    if words.flags["--replay"] is not None:
        return _replay(words)
    from launch.compose import compose
    from launch.placement import from_environment

    config = compose(words.words).config
    place = from_environment(os.environ, config.parallel)
    if place is None and (config.parallel.mesh.size > 1 or config.restarts):
        return attempts.start(["train", *argv], config.parallel.mesh.size, config.restarts)
    device.prepare(config.device)
    from trainer.run import train

    return train(
        config,
        new=words.flags["--new"],
        overrides=list(words.words),
        json=words.flags["--json"],
        place=place or SINGLE,
    )


def _replay(given: Arguments) -> int:
    if given.flags["--new"]:
        raise ValueError("--new = : expected no --replay beside it, which starts no run")
    crash = find_crash(given.flags["--replay"])
    from launch.compose import read

    config = read(crash / CONFIG_FILE, given.words)
    device.prepare(config.device)
    from trainer.debug.replay import replay

    return replay(config, crash, as_json=given.flags["--json"])
