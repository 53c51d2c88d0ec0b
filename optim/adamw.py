"""AdamW for embedding, head, norms and static mHC parameters (R 2.4; spec 5.1)."""

import math

from torch import Tensor

from optim.config import AdamWConfig


def update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    rate: float,
    weight_decay: float,
    config: AdamWConfig,
) -> Tensor:
    """One step on one tensor, all in place; `step` counts this tensor's updates from 1. Returns the change of weight.

    W <- W (1 - rate decay) - rate m / (sqrt(v) + eps), m and v the bias-corrected moments. The change returned is
    without the decay.
    """
    exp_avg.lerp_(gradient, 1 - config.beta1)
    exp_avg_sq.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
    correction = math.sqrt(1 - config.beta2**step)
    denominator = exp_avg_sq.sqrt().div_(correction).add_(config.eps)
    change = exp_avg.div(denominator).mul_(-rate / (1 - config.beta1**step))
    weight.mul_(1 - rate * weight_decay).add_(change)
    return change
