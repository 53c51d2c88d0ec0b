"""The clamped SwiGLU of the experts, routing weight included: the twin of `model.experts.clamped_swiglu`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.operand import operand

BLOCK_P, BLOCK_F = 4, 512


@triton.jit
def _forward(
    gate_ptr, up_ptr, weight_ptr, out_ptr, rows, limit, F: tl.constexpr, WEIGHT: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < F)[None, :]
    place = row[:, None] * F + channel[None, :]
    gate = tl.minimum(tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32), limit)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * tl.minimum(tl.maximum(up, -limit), limit)
    if WEIGHT:
        out = out * tl.load(weight_ptr + row, mask=row < rows, other=0.0)[:, None]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate_ptr, up_ptr, weight_ptr, grad_ptr, grad_gate_ptr, grad_up_ptr, grad_weight_ptr, rows, limit,
    F: tl.constexpr, WEIGHT: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A clamp hands its gradient on where it leaves the value as it is, its bounds included.
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    grad_weight = tl.zeros((P,), tl.float32)
    for first in range(0, F, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (channel < F)[None, :]
        place = row[:, None] * F + channel[None, :]
        raw_gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
        raw_up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        gate, up = tl.minimum(raw_gate, limit), tl.minimum(tl.maximum(raw_up, -limit), limit)
        sigmoid = tl.sigmoid(gate)
        if WEIGHT:
            grad_weight += tl.sum(grad * gate * sigmoid * up, 1)
            grad = grad * tl.load(weight_ptr + row, mask=row < rows, other=0.0)[:, None]
        grad_gate = tl.where(raw_gate <= limit, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), 0.0)
        grad_up = tl.where((raw_up >= -limit) & (raw_up <= limit), grad * gate * sigmoid, 0.0)
        tl.store(grad_gate_ptr + place, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_up_ptr + place, grad_up.to(grad_up_ptr.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(grad_weight_ptr + row, grad_weight, mask=row < rows)


def clamped_swiglu(gate_PF: Tensor, up_PF: Tensor, weight_P: Tensor | None, limit: float) -> Tensor:
    """`model.experts.clamped_swiglu`: weight * silu(min(gate, limit)) * clamp(up, -limit, limit), in gate's type."""
    weight_P = None if weight_P is None else operand(weight_P)
    return _SwiGLU.apply(operand(gate_PF), operand(up_PF), weight_P, limit)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_PF: Tensor, up_PF: Tensor, weight_P: Tensor | None, limit: float) -> Tensor:
        ctx.save_for_backward(gate_PF, up_PF, weight_P)
        ctx.limit = limit
        out_PF, F = torch.empty_like(gate_PF), gate_PF.shape[-1]
        rows = gate_PF.numel() // F
        grid = (triton.cdiv(rows, BLOCK_P), triton.cdiv(F, BLOCK_F))
        _forward[grid](gate_PF, up_PF, weight_P, out_PF, rows, limit, F, weight_P is not None, BLOCK_P, BLOCK_F)
        return out_PF

    @staticmethod
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gate_PF, up_PF, weight_P = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate_PF), torch.empty_like(up_PF)
        grad_weight = None if weight_P is None else torch.empty_like(weight_P)
        F = gate_PF.shape[-1]
        rows = gate_PF.numel() // F
        _backward[(triton.cdiv(rows, BLOCK_P),)](
            gate_PF, up_PF, weight_P, grad_PF.contiguous(), grad_gate, grad_up, grad_weight, rows, ctx.limit, F,
            weight_P is not None, BLOCK_P, BLOCK_F,
        )  # fmt: skip
        return grad_gate, grad_up, grad_weight, None
