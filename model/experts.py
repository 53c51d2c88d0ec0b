"""Routed and shared experts: clamped SwiGLU, all experts of a layer stacked in one parameter per kind.

Source: R 2.1, released code (spec 4.2). y = w2(weight * silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit)).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.layers import Linear, at_least_fp32


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_PF: Tensor, up_PF: Tensor, weight_P: Tensor | None, limit: float) -> Tensor:
        ctx.save_for_backward(gate_PF, up_PF, weight_P)
        ctx.limit = limit
        inner_PF = F.silu(at_least_fp32(gate_PF).clamp(max=limit))
        inner_PF.mul_(at_least_fp32(up_PF).clamp(-limit, limit))
        if weight_P is not None:
            inner_PF.mul_(weight_P.unsqueeze(-1))
        return inner_PF.to(gate_PF.dtype)

    @staticmethod
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[Tensor | None, ...]:
        gate_PF, up_PF, weight_P = ctx.saved_tensors
        gate, up, grad = at_least_fp32(gate_PF), at_least_fp32(up_PF), at_least_fp32(grad_PF)
        clamped, clamped_up = gate.clamp(max=ctx.limit), up.clamp(-ctx.limit, ctx.limit)
        sigmoid = torch.sigmoid(clamped)
        silu, grad_weight = clamped * sigmoid, None
        if weight_P is not None:
            grad_weight = torch.linalg.vecdot(grad * silu, clamped_up)
            grad = grad * weight_P.unsqueeze(-1)
        # silu' = sigmoid (1 + x (1 - sigmoid)) = sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        grad_gate = (grad * clamped_up).mul_(slope).mul_(gate <= ctx.limit)
        grad_up = (grad * silu).mul_(up.abs() <= ctx.limit)
        return grad_gate.to(gate_PF.dtype), grad_up.to(up_PF.dtype), grad_weight, None


def clamped_swiglu(gate_PF: Tensor, up_PF: Tensor, weight_P: Tensor | None, limit: float) -> Tensor:
    """weight * silu(min(gate, limit)) * clamp(up, -limit, limit), computed in at least fp32, in gate's type.

    weight_P: routing weight of each row in at least fp32, None for 1. The backward pass is by hand and keeps the
    arguments only.
    """
    return _ClampedSwiGLU.apply(gate_PF, up_PF, weight_P, limit)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_PD, w_EFD)
        ctx.counts = counts
        y_PF = x_PD.new_empty(x_PD.shape[0], w_EFD.shape[1])
        for x_pd, w_FD, y_pf in zip(x_PD.split(counts), w_EFD, y_PF.split(counts), strict=True):
            torch.mm(x_pd, w_FD.T, out=y_pf)
        return y_PF

    @staticmethod
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_PD, w_EFD = ctx.saved_tensors
        counts = ctx.counts
        grad_x, grad_w = torch.empty_like(x_PD), torch.empty_like(w_EFD)
        groups = zip(x_PD.split(counts), w_EFD, grad_PF.split(counts), grad_x.split(counts), grad_w, strict=True)
        for x_pd, w_FD, grad_pf, grad_pd, grad_FD in groups:
            torch.mm(grad_pf, w_FD, out=grad_pd)
            torch.mm(grad_pf.T, x_pd, out=grad_FD)
        return grad_x, grad_w, None


def grouped_matmul(x_PD: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
    """y = x W_e^T for the rows of each expert: counts[e] consecutive rows of x belong to expert e.

    One product per expert, forwards and backwards, so that a row's bits depend on its own expert's rows only; an
    expert without rows gets gradient 0.
    """
    return _GroupedMatmul.apply(x_PD, w_EFD, counts)


class Experts(nn.Module):
    """The routed experts of one layer: w1 (gate) and w3 (up) [E, F, D], w2 (down) [E, D, F].

    held: the layer's experts that are here, all of them or a part. `grouped_matmul` is the precision seam and,
    like `swiglu`, one for kernels: same signatures as the functions above.
    """

    def __init__(self, held: range, hidden: int, intermediate: int, limit: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.held, self.limit = held, limit
        experts = len(held)
        self.grouped_matmul, self.swiglu = grouped_matmul, clamped_swiglu
        self.w1 = nn.Parameter(torch.empty(experts, intermediate, hidden, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(experts, intermediate, hidden, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, intermediate, dtype=dtype))

    def forward(self, x_PD: Tensor, weight_P: Tensor, counts: list[int]) -> Tensor:
        """x_PD sorted by expert, the routing weight of each pair, rows per expert. Returns y_PD in x's type."""
        gate_PF = self.grouped_matmul(x_PD, self.w1, counts)
        up_PF = self.grouped_matmul(x_PD, self.w3, counts)
        inner_PF = self.swiglu(gate_PF, up_PF, weight_P, self.limit)
        return self.grouped_matmul(inner_PF, self.w2, counts)


class SharedExpert(nn.Module):
    """The expert every token passes: the same clamped SwiGLU, without a routing weight. `swiglu`: as in Experts."""

    def __init__(self, hidden: int, intermediate: int, limit: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.limit, self.swiglu = limit, clamped_swiglu
        self.w1 = Linear(hidden, intermediate, dtype)
        self.w3 = Linear(hidden, intermediate, dtype)
        self.w2 = Linear(intermediate, hidden, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.swiglu(self.w1(x), self.w3(x), None, self.limit))
