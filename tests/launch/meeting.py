"""A rank that finds its place in the environment, meets the others and adds its number to theirs."""

import os
import sys

import torch

from launch.placement import from_environment
from trainer.config import ParallelConfig
from trainer.parallel.world import start

if __name__ == "__main__":
    parallel = ParallelConfig(data=int(sys.argv[1]))
    place = from_environment(os.environ, parallel)
    assert place is not None
    world = start(parallel.mesh, place, torch.device("cpu"))
    assert world.gather((place.rank, place.local_rank)) == [(rank, rank) for rank in range(place.size)]
    world.close()
    # One write, newline and all: what two ranks print must not mix within a line.
    sys.stdout.write(f"rank {place.rank} has met {place.size}\n")
    sys.stdout.flush()
