"""What does the exact, order-free sum of gradients cost beside a plain float sum?

    python -m benchmarks.reduce [--repetitions N] [--leaves N]

One thread, fp32 leaves. "ns" is per parameter and leaf, "us per leaf" the whole call for one leaf of one tensor: for
small tensors it is the fixed cost of a call. "result" reads the sum out, once per step.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import report
from trainer.parallel.reduce import ExactSum

SIZES = (16, 1 << 10, 1 << 14, 1 << 18, 1 << 22)
LEAST_ELEMENTS = 1 << 20
"""Elements that one timing adds up at least, so that it is far above the clock's resolution."""
LEAF_STD = 1e-3
"""Small enough for all leaves of all repetitions together to stay below the sum's limit."""
COLUMNS = ("parameters", "exact ns", "plain ns", "ratio", "exact us per leaf", "plain us per leaf", "result ns")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--leaves", type=int, default=8, help="different leaves that are added in turn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [COLUMNS, *(_row(size, given.leaves, given.repetitions) for size in SIZES)]
    shapes = f"one fp32 tensor, {given.leaves} leaves added in turn; medians of {given.repetitions} repetitions"
    print(report.heading("benchmarks.reduce", shapes))
    print(report.table(rows))


def _row(size: int, leaves: int, repetitions: int) -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(size, generator=generator) * LEAF_STD for _ in range(leaves)]
    rounds = max(1, LEAST_ELEMENTS // (size * leaves))
    exact, plain = ExactSum({"w": torch.Size((size,))}, torch.float32, torch.device("cpu")), torch.zeros(size)
    actions = {
        "exact": lambda: _add_all(lambda leaf: exact.add("w", leaf), parts, rounds),
        "plain": lambda: _add_all(plain.add_, parts, rounds),
        "result": lambda: [exact.result() for _ in range(rounds)],
    }
    seconds = report.interleaved(actions, repetitions)
    exact_s, plain_s = seconds["exact"] / (rounds * leaves), seconds["plain"] / (rounds * leaves)
    return (
        f"{size:,}",
        f"{exact_s / size * 1e9:.2f}",
        f"{plain_s / size * 1e9:.2f}",
        f"{exact_s / plain_s:.1f}",
        f"{exact_s * 1e6:.1f}",
        f"{plain_s * 1e6:.1f}",
        f"{seconds['result'] / rounds / size * 1e9:.2f}",
    )


def _add_all(add: Callable[[Tensor], object], parts: list[Tensor], rounds: int) -> None:
    for _ in range(rounds):
        for part in parts:
            add(part)


if __name__ == "__main__":
    main()
