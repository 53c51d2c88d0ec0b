"""The products of all experts in one call: the twin of `model.experts.grouped_matmul`.

The kernel is a library's, `torch.nn.functional.grouped_mm`: one launch on an NVIDIA GPU in bf16, one product per expert
in fp32 and on a CPU. Per expert it computes what the plain function computes.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels.operand import operand


def grouped_matmul(x_PD: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
    """`model.experts.grouped_matmul`: y = x W_e^T; counts[e] consecutive rows of x belong to expert e.

    fp32 or bf16, D and F of multiples of 16 bytes. An expert without rows gets gradient 0.
    """
    assert sum(counts) == x_PD.shape[0], f"rows of the experts: expected {x_PD.shape[0]} in all, found {counts}"
    return _GroupedMatmul.apply(x_PD, w_EFD, counts)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
        x_PD, w_EFD = _rows(x_PD), operand(w_EFD)
        # Where each expert's rows end. Not blocking: the copy would wait for all that the GPU has yet to do.
        end_E = torch.tensor(list(accumulate(counts)), dtype=torch.int32).to(x_PD.device, non_blocking=True)
        ctx.save_for_backward(x_PD, w_EFD, end_E)
        ctx.counts = counts
        return F.grouped_mm(x_PD, w_EFD.mT, offs=end_E)

    @staticmethod
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_PD, w_EFD, end_E = ctx.saved_tensors
        grad_PF = _rows(grad_PF)
        grad_x = F.grouped_mm(grad_PF, w_EFD, offs=end_E)
        grad_w = F.grouped_mm(grad_PF.mT, x_PD, offs=end_E)
        # On some GPUs a sum over no rows is left as the memory was (pytorch issue 172439).
        for grad_FD, rows in zip(grad_w, ctx.counts, strict=True):
            if rows == 0:
                grad_FD.zero_()
        return grad_x, grad_w, None


def _rows(x: Tensor) -> Tensor:
    """x with one row after the other; also one row or none, of which any strides pass for contiguous."""
    return operand(x).view(-1).view(x.shape)
