"""The plain building blocks: linear map, embedding, RMSNorm, and the promotion that makes an fp32 island.

An island computes in at least fp32: bf16 is promoted, fp32 and fp64 stay what they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def at_least_fp32(x: Tensor) -> Tensor:
    """Promote bf16 or fp16 to fp32; fp32 and fp64 pass unchanged, so that an fp64 run is fp64 everywhere."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def island_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which parameters of fp32 islands are held when the model's type is `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dim, kept as a dim of 1; x in at least fp32."""
    return torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1] + eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        promoted = at_least_fp32(x)
        inverse = inverse_rms(promoted, eps)
        ctx.save_for_backward(x, weight, inverse)
        normal = promoted * inverse
        return normal if weight is None else normal.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normal = at_least_fp32(x) * inverse
        grad_weight = None
        if weight is not None:
            grad_weight = (grad * normal).flatten(0, -2).sum(0)
            grad = grad * weight
        mean = torch.linalg.vecdot(grad, normal).unsqueeze(-1) / x.shape[-1]
        return (grad - normal.mul_(mean)).mul_(inverse).to(x.dtype), grad_weight, None


def rms_normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, in at least fp32; the result stays promoted.

    weight: None for 1. The backward pass is by hand and keeps the arguments and a number per row.
    """
    return _RMSNorm.apply(x, weight, eps)


Rounding = Callable[[Tensor], Tensor]


def unrounded(x: Tensor) -> Tensor:
    """x itself: the plain default of the seams that round what attention looks at."""
    return x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_normalize`, returned in x's type."""
    return rms_normalize(x, weight, eps).to(x.dtype)


def run(module: nn.Module, *arguments: Any) -> Any:
    """module(*arguments): the plain default of the seams for recomputation."""
    return module(*arguments)


class RMSNorm(nn.Module):
    """RMSNorm with weight over the last dim. `norm` is a seam for kernels: same signature as `rms_norm`."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.norm = eps, rms_norm
        self.weight = nn.Parameter(torch.ones(dim, dtype=island_dtype(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.eps)


def fp32_product(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear as an fp32 island: router, compressor and head (released code, spec 1.3 and 2). Stays promoted."""
    return F.linear(at_least_fp32(x), at_least_fp32(weight))


class Linear(nn.Module):
    """y = x W^T without bias, W stored [out, in]. `matmul` is the precision seam: same signature as F.linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        matmul: Callable[[Tensor, Tensor], Tensor] = F.linear,
    ) -> None:
        super().__init__()
        self.matmul = matmul
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight)


class Embedding(nn.Module):
    """Rows of `weight` [V, D] by token id."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim, dtype=dtype))

    def forward(self, token_BT: Tensor) -> Tensor:
        return F.embedding(token_BT, self.weight)
