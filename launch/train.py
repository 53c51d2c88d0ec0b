"""`keel train`: compose a configuration and run it."""

from launch import arguments, device
from launch.arguments import Arguments
from launch.runs import CONFIG_FILE, find_crash

HELP = "train a model: the debug recipe in minutes on a laptop, any other with recipe=NAME"
USAGE = f"""
keel train [--new] [--json] [KEY=VALUE ...]
keel train --replay CRASH [--json] [KEY=VALUE ...]

{HELP}.
The same command again continues an unfinished run; a finished one is left alone.

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

    config = compose(words.words).config
    device.prepare(config.device)
    from trainer.run import train

    return train(config, new=words.flags["--new"], overrides=list(words.words), json=words.flags["--json"])


def _replay(given: Arguments) -> int:
    if given.flags["--new"]:
        raise ValueError("--new = : expected no --replay beside it, which starts no run")
    crash = find_crash(given.flags["--replay"])
    from launch.compose import read

    config = read(crash / CONFIG_FILE, given.words)
    device.prepare(config.device)
    from trainer.debug.replay import replay

    return replay(config, crash, as_json=given.flags["--json"])
