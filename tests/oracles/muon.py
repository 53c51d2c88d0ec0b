"""Oracle: Muon and AdamW for one tensor in float64, from the report's Algorithm 1 and nothing of ours."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def polar_factor(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition: what ten iterations approach."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


def hybrid_newton_schulz(matrix: Tensor) -> Tensor:
    """Ten iterations in float64 on a single matrix, steps 1-8 and 9-10 with their own coefficients."""
    x = matrix.double()
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    length = x.square().sum().sqrt()
    x = x / length if length > 0 else x
    for step in range(1, 11):
        a, b, c = (3.4445, -4.7750, 2.0315) if step <= 8 else (2.0, -1.5, 0.5)
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if turned else x


@dataclass
class MuonMatrix:
    """One logically independent matrix and its momentum."""

    weight: Tensor
    momentum: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = self.weight.double().clone()
        self.momentum = torch.zeros_like(self.weight)

    def step(self, gradient: Tensor, rate: float, *, mu: float, decay: float, rms: float) -> None:
        """M <- mu M + G; O = NS(mu M + G); W <- W (1 - rate decay) - rate rms sqrt(max(n, m)) O."""
        gradient = gradient.double()
        self.momentum = mu * self.momentum + gradient
        direction = hybrid_newton_schulz(mu * self.momentum + gradient)
        scale = rms * math.sqrt(max(self.weight.shape))
        self.weight = self.weight * (1 - rate * decay) - rate * scale * direction


@dataclass
class AdamTensor:
    """One tensor under AdamW with bias correction."""

    weight: Tensor
    updates: int = 0
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = self.weight.double().clone()
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    def step(self, gradient: Tensor, rate: float, *, beta1: float, beta2: float, eps: float, decay: float) -> None:
        gradient = gradient.double()
        self.updates += 1
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        first, second = self.first / (1 - beta1**self.updates), self.second / (1 - beta2**self.updates)
        self.weight = self.weight * (1 - rate * decay) - rate * first / (second.sqrt() + eps)
