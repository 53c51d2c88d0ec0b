"""`keel resume RUN`: go on with a run from its newest whole checkpoint."""

from launch import arguments, device
from launch.runs import CONFIG_FILE, find_run

HELP = "continue a run from its newest whole checkpoint"
USAGE = f"""
keel resume RUN [KEY=VALUE ...]

{HELP}.

  RUN          a run's folder, or its name under runs/
  KEY=VALUE    overrides of what may differ between the parts of a run
"""


def main(argv: list[str]) -> int:
    """Resume; returns the exit code of the run."""
    words = arguments.parse(argv, {}, USAGE).words
    folder = find_run(words[0] if words else "")
    from launch.compose import read

    config = read(folder / CONFIG_FILE, words[1:])
    device.refuse_idle_gpu(config.device)
    from trainer.run import resume

    return resume(folder, config, overrides=list(words[1:]))
