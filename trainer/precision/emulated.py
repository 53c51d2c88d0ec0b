"""The emulated back end: what the three products of a linear map with FP8 operands mean, on any device.

Operands are rounded to their formats and multiplied as numbers of the run's type, which holds them exactly: a product
has its operands' bits from the formats and its sums from the device's ordinary products. Every other back end is held
to this one.

y = Q_input(x) W^T;  dx = Q_grad(dy) Q_dgrad_weight(W);  dW = Q_wgrad_grad(dy)^T Q_wgrad_input(Q_input(x)). W holds its
format's numbers already (`weights.py`); its gradient goes straight through to the master. Between the passes inputs are
kept as codes.
Source: spec 7.2 and 7.3 (V3's rules for FP8 training, assumed for V4).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.precision.elements import Format
from trainer.precision.formats import Coded, decode, encode
from trainer.precision.health import Watch
from trainer.precision.operands import Groups
from trainer.precision.recipe import Formats

Linear = Callable[[Tensor, Tensor], Tensor]
Grouped = Callable[[Tensor, Tensor, list[int]], Tensor]


def refusal(formats: Formats, device: torch.device) -> str:
    """Why these formats cannot be computed on the device; "": they can. Emulation can all of them."""
    return ""


def linear(formats: Formats, watch: Watch) -> Linear:
    """`F.linear` with rounded operands: x [..., in], weight [out, in] to y [..., out]."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        y_GPF = _Products.apply(x.flatten(0, -2).unsqueeze(0), _taught(weight).unsqueeze(0), formats, watch)
        return y_GPF.squeeze(0).unflatten(0, x.shape[:-1])

    return product


def side_by_side(formats: Formats, watch: Watch) -> Linear:
    """`model.attention.group_products` with rounded operands: x [..., G, in], weight [G, out, in], y [..., G, out]."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        y_GPF = _Products.apply(x.flatten(0, -3).transpose(0, 1), _taught(weight), formats, watch)
        return y_GPF.transpose(0, 1).unflatten(0, x.shape[:-2])

    return product


def grouped(formats: Formats, watch: Watch) -> Grouped:
    """`model.experts.grouped_matmul` with rounded operands; blocks along tokens begin with each expert's first."""

    def product(x_PD: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
        return _GroupedProducts.apply(x_PD, _taught(w_EFD), counts, formats, watch)

    return product


class _Products(torch.autograd.Function):
    """G maps side by side: x_GPC, weight_GFC to y_GPF."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, formats: Formats, watch: Watch) -> Tensor:
        ctx.formats, ctx.watch, ctx.dtype = formats, watch, x.dtype
        taken = cast(x, formats.input, "input", watch)
        ctx.save_for_backward(weight, *(_kept(taken, formats) if ctx.needs_input_grad[1] else ()))
        return torch.bmm(taken, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        formats, watch = ctx.formats, ctx.watch
        weight, *kept = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight = cast(weight, formats.dgrad_weight, "dgrad_weight", watch)
            grad_x = torch.bmm(cast(grad, formats.grad, "grad", watch), weight)
        if ctx.needs_input_grad[1]:
            of_weight = cast(grad, formats.wgrad_grad, "wgrad_grad", watch)
            grad_weight = torch.bmm(of_weight.mT, _taken_out(kept, formats, ctx.dtype))
        return grad_x, grad_weight, None, None


class _GroupedProducts(torch.autograd.Function):
    """The products of each expert's rows; see `grouped`. wgrad's operands lie in groups of whole blocks of rows."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w_EFD: Tensor, counts: list[int], formats: Formats, watch: Watch) -> Tensor:
        ctx.formats, ctx.watch, ctx.dtype, ctx.counts = formats, watch, x_PD.dtype, counts
        taken_PD = cast(x_PD, formats.input, "input", watch)
        ctx.groups = Groups(counts, _side(formats))
        kept = _kept(ctx.groups.spread(taken_PD), formats) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(w_EFD, *kept)
        y_PF = taken_PD.new_empty(taken_PD.shape[0], w_EFD.shape[1])
        for x_pd, w_FD, y_pf in zip(taken_PD.split(counts), w_EFD, y_PF.split(counts), strict=True):
            torch.mm(x_pd, w_FD.T, out=y_pf)
        return y_PF

    @staticmethod
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[Tensor | None, ...]:
        formats, watch, groups = ctx.formats, ctx.watch, ctx.groups
        w_EFD, *kept = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            rounded_PF = cast(grad_PF, formats.grad, "grad", watch)
            w_EFD = cast(w_EFD, formats.dgrad_weight, "dgrad_weight", watch)
            grad_x = grad_PF.new_empty(grad_PF.shape[0], w_EFD.shape[2])
            parts = zip(rounded_PF.split(ctx.counts), w_EFD, grad_x.split(ctx.counts), strict=True)
            for grad_pf, w_FD, grad_pd in parts:
                torch.mm(grad_pf, w_FD, out=grad_pd)
        if ctx.needs_input_grad[1]:
            of_weight = cast(groups.spread(grad_PF), formats.wgrad_grad, "wgrad_grad", watch)
            x_QD, grad_w = _taken_out(kept, formats, ctx.dtype), torch.empty_like(w_EFD)
            for grad_qf, x_qd, grad_FD in zip(
                of_weight.split(groups.sizes), x_QD.split(groups.sizes), grad_w, strict=True
            ):
                torch.mm(grad_qf.T, x_qd, out=grad_FD)
        return grad_x, grad_w, None, None, None


def _taught(weight: Tensor) -> Tensor:
    """The weight; as one without a gradient where none is taken, so that the input is not rounded for that too.

    A function of autograd cannot tell: within it gradients are off, and its weight asks for one, in any case.
    """
    return weight if torch.is_grad_enabled() else weight.detach()


def _side(formats: Formats) -> int:
    """Rows that each expert's are filled up to with zeros, so that no block along tokens has rows of two experts."""
    blocks = [one.block[0] for one in (formats.wgrad_input, formats.wgrad_grad) if one is not None]
    return math.lcm(*blocks)


def cast(x: Tensor, format: Format | None, operand: str, watch: Watch) -> Tensor:
    """x in a format's numbers, itself without one; noted as this operand where the watch is on."""
    if format is None:
        return x
    coded = encode(x, format)
    values = decode(coded, format, x.dtype)
    if watch.on:
        watch.note(operand, x, values, coded)
    return values


def _kept(taken: Tensor, formats: Formats) -> Sequence[Tensor]:
    """What wgrad needs of its input: codes and scales, or the input itself where it has no format."""
    if formats.wgrad_input is None:
        return (taken,)
    coded = encode(taken, formats.wgrad_input)
    return coded.codes, coded.exponents


def _taken_out(kept: Sequence[Tensor], formats: Formats, dtype: torch.dtype) -> Tensor:
    if formats.wgrad_input is None:
        return kept[0]
    return decode(Coded(codes=kept[0], exponents=kept[1]), formats.wgrad_input, dtype)
