"""What kernels ask of the tensors they read."""

import torch
from torch import Tensor

PARTIALS = 256
"""Most partial sums of a sum over rows. It depends on no device, so that the bits do not either."""


def operand(x: Tensor) -> Tensor:
    """x, contiguous; TypeError if it is fp64, which kernels would round to fp32."""
    if x.dtype == torch.float64:
        raise TypeError("kernels compute in fp32: expected fp32 or bf16, found fp64 (kernels=off computes in fp64)")
    return x.contiguous()
