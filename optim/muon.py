"""Muon: momentum, Nesterov, orthogonalised update of constant RMS, decoupled decay (R Algorithm 1; spec 5.2)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optim.config import MuonConfig
from optim.newton_schulz import orthogonalize

BATCH_ELEMENTS = 1 << 24
"""Elements that are orthogonalised at a time: bounds the memory of the stacked copies."""


def lookahead(momentum: Tensor, gradient: Tensor, mu: float) -> Tensor:
    """M <- mu M + G in place, a plain accumulation; returns mu M + G with the new M (Nesterov)."""
    momentum.mul_(mu).add_(gradient)
    return gradient.add(momentum, alpha=mu)


def update(weights: Sequence[Tensor], directions: Sequence[Tensor], rates: Sequence[float], config: MuonConfig) -> None:
    """W <- W (1 - rate decay) - rate rms sqrt(max(R, C)) O for matrices [R, C] of one shape, in place.

    O is the orthogonalised direction; each matrix is orthogonalised by itself, in batches only for speed.
    """
    rows, columns = weights[0].shape
    scale = update_scale(rows, columns, config)
    size = max(1, BATCH_ELEMENTS // (rows * columns))
    for first in range(0, len(weights), size):
        part = slice(first, first + size)
        orthogonal_XRC = orthogonalize(torch.stack(list(directions[part])))
        for weight, rate, orthogonal in zip(weights[part], rates[part], orthogonal_XRC, strict=True):
            weight.mul_(1 - rate * config.weight_decay).add_(orthogonal, alpha=-rate * scale)


def update_scale(rows: int, columns: int, config: MuonConfig) -> float:
    """rms sqrt(max(R, C)): an orthogonal R x C matrix has RMS 1 / sqrt(max(R, C)), so the update has RMS `rms`."""
    return config.update_rms * math.sqrt(max(rows, columns))
