"""Muon: momentum, Nesterov, orthogonalised update of constant RMS, decoupled decay (R Algorithm 1; spec 5.2)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optim.config import MuonConfig
from optim.iterations import BATCH_ELEMENTS
from optim.newton_schulz import orthogonalize


def lookahead(momentum: Tensor, gradient: Tensor, mu: float) -> Tensor:
    """M <- mu M + G in place, a plain accumulation; returns mu M + G with the new M (Nesterov)."""
    momentum.mul_(mu).add_(gradient)
    return gradient.add(momentum, alpha=mu)


def batches(matrices: Sequence[Tensor]) -> Iterator[slice]:
    """Cut a list of matrices of one shape into batches of bounded size."""
    size = max(1, BATCH_ELEMENTS // max(1, matrices[0].numel()))
    return (slice(first, first + size) for first in range(0, len(matrices), size))


def update(weights: Sequence[Tensor], directions: Sequence[Tensor], rates: Sequence[float], config: MuonConfig) -> None:
    """W <- W (1 - rate decay) - rate rms sqrt(max(R, C)) O for matrices [R, C] of one shape, in place.

    O is the orthogonalised direction; each matrix is orthogonalised by itself, in one batch only for speed.
    """
    rows, columns = weights[0].shape
    scale = update_scale(rows, columns, config)
    orthogonal_XRC = orthogonalize(torch.stack(list(directions)))
    for weight, rate, orthogonal in zip(weights, rates, orthogonal_XRC, strict=True):
        weight.mul_(1 - rate * config.weight_decay).add_(orthogonal, alpha=-rate * scale)


def update_scale(rows: int, columns: int, config: MuonConfig) -> float:
    """rms sqrt(max(R, C)): an orthogonal R x C matrix has RMS 1 / sqrt(max(R, C)), so the update has RMS `rms`."""
    return config.update_rms * math.sqrt(max(rows, columns))
