"""A layout scaled down to one machine. Nothing here needs torch: what starts the processes has none."""

from dataclasses import replace

from trainer.config import ParallelConfig

MOST_RANKS = 4
"""Most processes that a layout is scaled down to on one machine."""


def scaled_layout(parallel: ParallelConfig, experts: int) -> ParallelConfig:
    """A layout of 2 to MOST_RANKS ranks with the same axes in use, if these and the number of experts allow.

    Of such the largest whose data ranks divide those given, and if none does the largest.
    """

    def shared(data: int) -> int:
        most = min(parallel.expert, data)
        return next(size for size in range(most, 0, -1) if data % size == experts % size == 0)

    def merits(data: int) -> tuple[bool, bool, int]:
        return parallel.expert == 1 or shared(data) > 1, parallel.data % data == 0, data

    data = max(range(2, min(parallel.data, MOST_RANKS) + 1), key=merits)
    return replace(parallel, data=data, expert=shared(data), owners_limit=min(parallel.owners_limit, data))
