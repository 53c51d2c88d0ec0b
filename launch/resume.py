"""`keel resume RUN`: go on with a run from its newest whole checkpoint."""

from launch import arguments, device
from launch.runs import CONFIG_FILE, find_run

HELP = "continue a run from its newest whole checkpoint"
USAGE = f"""
keel resume RUN [--allow-changes [KEY=VALUE ...]]

{HELP}.

  RUN                a run's folder, or its name under runs/
  --allow-changes    go on although something differs that may change the bits: versions, device, kernels, data,
                     or overrides
  KEY=VALUE          overrides of the run's own configuration
"""


def main(argv: list[str]) -> int:
    """Resume; returns the exit code of the run."""
    given = arguments.parse(argv, {"--allow-changes": bool}, USAGE)
    run, *overrides = given.words or ("",)
    folder, allow_changes = find_run(run), given.flags["--allow-changes"]
    if overrides and not allow_changes:
        raise ValueError(
            f"overrides = {' '.join(overrides)}: expected none, a run goes on as it began; "
            "or --allow-changes, which gives up bit-equality"
        )
    from launch.compose import read

    config = read(folder / CONFIG_FILE, overrides)
    device.prepare(config.device)
    from trainer.folder import RunFolder
    from trainer.run import resume

    return resume(config, RunFolder(folder), allow_changes=allow_changes)
