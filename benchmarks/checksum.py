"""What do the checksums against silent corruption cost?

    python -m benchmarks.checksum [--repetitions N] [--ranks N ...] [KEY=VALUE ...]

First the checksum itself, on one thread, by the size of an fp32 tensor, beside a plain sum of the same memory, which
shows how fast that can be read. Then the debug recipe (or the given overrides) on its own data, one thread per rank: a
sparse step, a look after it (checksums of all that a rank holds, compared with its replicas) and the verification
before the next update; and their share of a step at `parallel.check_every_steps`, and at each save, which has one look
and two verifications.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.step import stages
from launch.compose import compose
from trainer.build import build, read_data
from trainer.device import settle
from trainer.guard import Guard
from trainer.parallel.checksum import Checksum
from trainer.parallel.placement import Placement
from trainer.parallel.world import start
from trainer.step import train_step

SIZES = (1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 25)
LEAST_BYTES = 1 << 24
"""Memory that one timing reads at least, so that it is far above the clock's resolution."""


def main() -> None:
    """Print the speed of a checksum by size, then what a look costs by number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    speeds = [_speed(size, given.repetitions) for size in SIZES]
    costs = [_cost(ranks, given.repetitions, given.overrides) for ranks in given.ranks]
    print(report.heading("benchmarks.checksum", f"as said below; medians of {given.repetitions} repetitions"))
    print("\none fp32 tensor on one thread")
    print(report.table([("elements", "us", "GB/s", "plain sum GB/s"), *speeds]))
    print("\nmilliseconds on rank 0; shares of a step: of looks every so many steps, of a save")
    columns = ("ranks", "rows x tokens", "tensors", "MB", "step", "look", "verify", "every", "looks", "save")
    print(report.table([columns, *costs]))


def _speed(elements: int, repetitions: int) -> tuple[str, ...]:
    tensor, checksum = torch.randn(elements), Checksum()
    whole = tensor.view(torch.int64)
    rounds = max(1, LEAST_BYTES // tensor.nbytes)
    actions = {
        "checksum": lambda: [checksum(tensor) for _ in range(rounds)],
        "plain": lambda: [whole.sum() for _ in range(rounds)],
    }
    for action in actions.values():
        action()
    found, plain = (seconds / rounds for seconds in report.interleaved(actions, repetitions).values())
    return (
        f"{elements:,}",
        f"{found * 1e6:.1f}",
        f"{tensor.nbytes / found / 1e9:.1f}",
        f"{tensor.nbytes / plain / 1e9:.1f}",
    )


def _cost(ranks: int, repetitions: int, overrides: Sequence[str]) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        children = [
            context.Process(target=_rank, args=(rank, ranks, Path(folder), repetitions, tuple(overrides)))
            for rank in range(ranks)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert all(child.exitcode == 0 for child in children), "a rank failed"
        found = json.loads((Path(folder) / "found.json").read_text())
    step, look, verify, every = (found[key] for key in ("step", "look", "verify", "every"))
    times = [f"{1e3 * seconds:.1f}" for seconds in (step, look, verify)]
    shares = ((look + verify) / every / step if every else 0.0, (look + 2 * verify) / step)
    return (
        f"{ranks}",
        found["rows"],
        f"{found['tensors']}",
        f"{found['bytes'] / 1e6:.1f}",
        *times,
        f"{every}",
        f"{shares[0]:.3%}",
        f"{shares[1]:.1%}",
    )


def _rank(rank: int, ranks: int, folder: Path, repetitions: int, overrides: Sequence[str]) -> None:
    """Time the parts of a step with its look on one of the ranks; rank 0 writes them down."""
    config = compose(["device=cpu", "threads=1", f"parallel.data={ranks}", *overrides]).config
    device = settle(config)
    place = Placement(rank=rank, size=ranks, local_rank=rank, address=f"file://{folder / 'meet'}")
    world = start(config.parallel.mesh, place, device)
    built = build(config, read_data(config, lambda line: None), device, world)
    plan, guard = stages(built)[-1], Guard(built.parts, 1)
    actions = {
        "step": lambda: train_step(built.parts, plan, lambda: False),
        "look": lambda: guard.after_step(1, saves=False),
        "verify": guard.before_update,
    }
    for action in actions.values():
        action()
    seconds = report.interleaved(actions, repetitions)
    held = built.tensors().values()
    about = {
        "rows": f"{plan.rows} x {plan.row_length}",
        "tensors": len(held),
        "bytes": sum(tensor.nbytes for tensor in held),
        "every": config.parallel.check_every_steps,
    }
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(seconds | about))
    world.close()


if __name__ == "__main__":
    main()
