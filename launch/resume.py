"""`keel resume RUN`: go on with a run from its newest whole checkpoint."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from launch import arguments, attempts, device
from launch.runs import CONFIG_FILE, find_run
from trainer.parallel.placement import SINGLE

if TYPE_CHECKING:
    from trainer.config import TrainConfig

HELP = "continue a run from its newest whole checkpoint"
USAGE = f"""
keel resume RUN [LAYOUT ...]
keel resume RUN --allow-changes [KEY=VALUE ...]

{HELP}.

  RUN                a run's folder, or its name under runs/
  LAYOUT             other processes than those it began with, where sums are exact: parallel=cpu2, parallel=single,
                     or single keys of parallel.* and threads; started as by keel train
  --allow-changes    go on although something differs that may change the bits: versions, device, kernels, data,
                     or overrides
  KEY=VALUE          overrides of the run's own configuration
"""
LAYOUT = (
    "threads",
    "restarts",
    "patience_s",
    *(f"parallel.{key}" for key in ("pipe", "data", "expert", "context", "owners_limit")),
)
"""Keys that decide who computes what, and no bit of it while sums are exact (docs/reproducibility.md)."""


def main(argv: list[str]) -> int:
    """Resume; returns the exit code of the run."""
    given = arguments.parse(argv, {"--allow-changes": bool}, USAGE)
    run, *overrides = given.words or ("",)
    folder, allow_changes = find_run(run), given.flags["--allow-changes"]
    from launch.compose import read
    from launch.placement import from_environment

    config = read(folder / CONFIG_FILE, overrides)
    if overrides and not (allow_changes or same_bits(read(folder / CONFIG_FILE), config)):
        raise ValueError(
            f"overrides = {' '.join(overrides)}: expected none but a layout with exact sums, a run goes on as it "
            "began; or --allow-changes, which gives up bit-equality"
        )
    place = from_environment(os.environ, config.parallel)
    if place is None and (config.parallel.mesh.size > 1 or config.restarts):
        return attempts.start(["resume", *argv], config.parallel.mesh.size, config.restarts)
    device.prepare(config.device)
    from trainer.folder import RunFolder
    from trainer.run import resume

    return resume(config, RunFolder(folder), allow_changes=allow_changes, place=place or SINGLE)


def same_bits(began: "TrainConfig", goes_on: "TrainConfig") -> bool:
    """Whether two configurations differ in their layout only, and it decides nothing."""
    from trainer.leaves import flatten

    was, now = flatten(asdict(began)), flatten(asdict(goes_on))
    changed = {key for key in was | now if was.get(key) != now.get(key)}
    return not changed or (changed <= set(LAYOUT) and began.parallel.reduction == "exact")
