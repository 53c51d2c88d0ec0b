"""A layout scaled down to one machine. Nothing here needs torch: what starts the processes has none."""

from dataclasses import replace

from trainer.config import ParallelConfig
from trainer.parallel.mesh import largest_divisor

MOST_RANKS = 4
"""Most processes that a layout is scaled down to on one machine."""


def scaled_layout(parallel: ParallelConfig) -> ParallelConfig:
    """A layout of at most MOST_RANKS ranks with the same axes in use, as far as these allow."""
    data = largest_divisor(parallel.data, MOST_RANKS)
    shared = (size for size in range(min(parallel.expert, data), 0, -1) if data % size == parallel.expert % size == 0)
    return replace(parallel, data=data, expert=next(shared), owners_limit=min(parallel.owners_limit, data))
