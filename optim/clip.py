"""The global gradient norm and the clip (V3: norm 1.0). The norm is the same however tensors are distributed.

Squares are summed in fp64 per fixed block of a logical tensor, blocks are added exactly: so it does not matter who
holds which tensor, nor in what order they come.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BLOCK = 4096
"""Elements whose squares are summed by one kernel; blocks are then added exactly."""


def norm_of(total: float, sums: Mapping[str, Sequence[float]]) -> float:
    """The norm from the sum of all squares; FloatingPointError, naming the first of `sums`, if it is not finite."""
    if not math.isfinite(total):
        bad = (name for name in sorted(sums) if not all(map(math.isfinite, sums[name])))
        name = next(bad, "of another process")
        raise FloatingPointError(f"gradient {name}: expected finite values; the step was not taken")
    return math.sqrt(total)


def clip_scale(norm: float, limit: float) -> float:
    """The factor that brings a norm down to the limit; 1 when it is not above."""
    return limit / norm if norm > limit else 1.0


def square_sums(gradient: Tensor) -> list[float]:
    """The sum of squares of each block of a logical tensor."""
    flat = gradient.reshape(-1).double()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).unflatten(0, (-1, BLOCK))
    return padded.square_().sum(-1).tolist()
