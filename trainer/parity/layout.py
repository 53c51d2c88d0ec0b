"""A layout scaled down to one machine. Nothing here needs torch: what starts the processes has none."""

from dataclasses import replace

from trainer.config import ParallelConfig

MOST_RANKS = 4
"""Most data ranks that a layout is scaled down to on one machine."""
MOST_STAGES = 2
"""Most pipe ranks that it is scaled down to."""


def scaled_layout(parallel: ParallelConfig, experts: int) -> ParallelConfig:
    """A layout of few ranks with the same axes in use, if these and the number of experts allow.

    Of such the largest whose data ranks divide those given, and if none does the largest; beside stages at most 2.
    """
    pipe = min(parallel.pipe, MOST_STAGES)

    def shared(data: int) -> int:
        most = min(parallel.expert, data)
        return next(size for size in range(most, 0, -1) if data % size == experts % size == 0)

    def merits(data: int) -> tuple[bool, bool, int]:
        return parallel.expert == 1 or shared(data) > 1, parallel.data % data == 0, data

    most = min(parallel.data, MOST_RANKS // pipe)
    data = max(range(min(2, most), most + 1), key=merits)
    owners_limit = min(parallel.owners_limit, data)
    return replace(parallel, pipe=pipe, stages=(), data=data, expert=shared(data), owners_limit=owners_limit)
