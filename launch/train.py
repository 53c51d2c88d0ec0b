"""`keel train`: compose a configuration and run it."""

from launch import arguments, device

HELP = "train a model: the debug recipe in minutes on a laptop, any other with recipe=NAME"
USAGE = f"""
keel train [--new] [--json] [KEY=VALUE ...]

{HELP}.
The same command again continues an unfinished run; a finished one is left alone.

  --new        start afresh beside earlier runs of the same configuration
  --json       progress as JSON lines on standard output
  KEY=VALUE    overrides, e.g. recipe=flash, model=small, schedule.rate.peak=1e-3 (keel config show lists all keys)
"""


def main(argv: list[str]) -> int:
    """Train; returns the exit code of the run."""
    words = arguments.parse(argv, {"--new": bool, "--json": bool}, USAGE)
    from launch.compose import compose

    config = compose(words.words).config
    device.prepare(config.device)
    from trainer.run import train

    return train(config, new=words.flags["--new"], overrides=list(words.words), json=words.flags["--json"])
