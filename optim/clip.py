"""The global gradient norm and the clip (V3: norm 1.0). The norm is the same however tensors are distributed."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK = 4096
"""Elements whose squares are summed by one kernel; blocks are then added exactly."""


def global_norm(gradients: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all tensors: squares summed in fp64 per fixed block, blocks by math.fsum in name order.

    Experts [E, F, D] are cut expert by expert. Raises FloatingPointError naming the first tensor that is not finite.
    """
    sums: list[float] = []
    for name in sorted(gradients):
        blocks = _block_sums(gradients[name])
        if not all(map(math.isfinite, blocks)):
            raise FloatingPointError(f"gradient {name}: expected finite values; the step was not taken")
        sums += blocks
    return math.sqrt(math.fsum(sums))


def clip_scale(norm: float, limit: float) -> float:
    """The factor that brings a norm down to the limit; 1 when it is not above."""
    return limit / norm if norm > limit else 1.0


def _block_sums(gradient: Tensor) -> list[float]:
    flat = gradient.flatten(1) if gradient.dim() == 3 else gradient.reshape(1, -1)
    padding = -flat.shape[1] % BLOCK
    padded = torch.nn.functional.pad(flat.double(), (0, padding)).unflatten(1, (-1, BLOCK))
    return padded.square_().sum(-1).flatten().tolist()
