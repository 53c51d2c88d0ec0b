"""`keel check parity`: the user's own configuration, scaled down, on one process and on a layout, term by term."""

import json
import os

from launch import arguments, attempts, device

HELP = "check that a layout computes what one process computes"
USAGE = f"""
keel check parity [--json] [KEY=VALUE ...]

{HELP}.
The configuration is scaled down until it takes seconds: a layer of each kind, every feature on, your precision,
recomputation, optimizer and layout; over made-up rows, through every stage of attention. It runs on one process and on
the layout (parallel=cpu4, or the sizes of parallel.*; more than a machine's few are scaled down, too), and losses by
term, gradient norm, updates, every weight and every momentum are compared. On the exact path all must be the same bits;
on the fast path (parallel.reduction=fast) those of the layout's second run. Exit code 1 where they are not.

  --json       everything that was compared, for programs
  KEY=VALUE    overrides, e.g. recipe=flash parallel=cpu4 (keel config show lists all keys)
"""
WHAT = ("parity",)


def main(argv: list[str]) -> int:
    """Compare; returns 0 if what the layout promises is so, else 1."""
    given = arguments.parse(argv, {"--json": bool}, USAGE)
    what, *overrides = given.words or ("",)
    if what not in WHAT:
        raise ValueError(f"check = {what}: expected {' or '.join(WHAT)}")
    from launch.compose import compose
    from launch.placement import from_environment
    from trainer.parity.layout import scaled_layout

    config = compose(overrides).config
    if config.parallel.mesh.size == 1:
        raise ValueError("parallel = one process: expected a layout of several, e.g. parallel=cpu4")
    place = from_environment(os.environ, config.parallel) if os.environ.get("RANK") else None
    if place is None:
        layout = scaled_layout(config.parallel, config.model.n_routed_experts)
        sizes: dict[str, object] = {"data": layout.data, "expert": layout.expert, "owners_limit": layout.owners_limit}
        sizes |= {"pipe": layout.pipe, "stages": []}
        words = [*overrides, *(f"parallel.{key}={size}" for key, size in sizes.items())]
        flags = ["--json"] if given.flags["--json"] else []
        return attempts.start(["check", what, *flags, *words], layout.mesh.size, restarts=0)
    device.prepare(config.device)
    from trainer.parity import check, scale

    small = scale.scaled(config)
    parity = check.check(small, place)
    if place.rank == 0:
        as_json = given.flags["--json"]
        print(json.dumps(check.as_json(parity), indent=1) if as_json else "\n".join(check.lines(small, parity)))
    return 0 if parity.kept else 1
