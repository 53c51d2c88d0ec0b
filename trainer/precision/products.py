"""The three products of `emulated.py` by block-scaled tensor-core products: what the back ends torch and te share.

Codes and scales are ours and the same in every back end, by kernels on a GPU that has triton; only who multiplies
differs, and with it the order of the sums. Linear maps, maps side by side and experts are all groups of rows with a
weight each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.precision import layouts
from trainer.precision.elements import Format
from trainer.precision.emulated import Grouped, Linear
from trainer.precision.formats import Coded, decode, encode
from trainer.precision.health import Watch
from trainer.precision.layouts import Layout
from trainer.precision.operands import Groups, Kept, Operand
from trainer.precision.recipe import Formats

Multiply = Callable[[Sequence[tuple[Operand, Operand]], torch.dtype], Sequence[Tensor]]
"""a b^T of each pair in fp32 or bf16; a's blocks are 1x128, b's 1x128 or 128x128, or all are 1x32."""
DTYPES = (torch.float32, torch.bfloat16)
KEPT = ("codes", "exponents")
NOTED = 1 << 24
"""Numbers that notes are taken of at a time: in fp64, of a long row's whole channels, they would not fit beside it."""


def linear(multiply: Multiply, formats: Formats, watch: Watch) -> Linear:
    """As `emulated.linear`."""
    product = grouped(multiply, formats, watch)

    def linear_product(x: Tensor, weight: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return product(rows, weight.unsqueeze(0), [len(rows)]).unflatten(0, x.shape[:-1])

    return linear_product


def side_by_side(multiply: Multiply, formats: Formats, watch: Watch) -> Linear:
    """As `emulated.side_by_side`: the groups' rows one group after the other."""
    product = grouped(multiply, formats, watch)

    def grouped_product(x: Tensor, weight: Tensor) -> Tensor:
        x_GPC = x.flatten(0, -3).transpose(0, 1)
        G, P = x_GPC.shape[:2]
        y_GPF = product(x_GPC.flatten(0, 1), weight, [P] * G).unflatten(0, (G, P))
        return y_GPF.transpose(0, 1).unflatten(0, x.shape[:-2])

    return grouped_product


def grouped(multiply: Multiply, formats: Formats, watch: Watch) -> Grouped:
    """As `emulated.grouped`."""
    layout = layouts.of(formats)
    kept = Kept(lambda weight: layout.weight(weight, formats))

    def product(x_PD: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
        assert x_PD.dtype in DTYPES
        return _Products.apply(x_PD, w_EFD, Groups(counts, layout.side), formats, watch, multiply, kept, layout)

    return product


class _Products(torch.autograd.Function):
    """The three products of each group's rows and its weight, x_PD and w_EFD to y_PF; see `emulated.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        w_EFD: Tensor,
        groups: Groups,
        formats: Formats,
        watch: Watch,
        multiply: Multiply,
        kept: Kept,
        layout: Layout,
    ) -> Tensor:
        coded = layout.casts().cast_rows(x_PD, _floor(formats.input))
        _note(watch, "input", x_PD, formats.input)
        weights = kept.of(w_EFD)
        ctx.groups, ctx.formats, ctx.watch, ctx.multiply, ctx.layout = groups, formats, watch, multiply, layout
        ctx.weights, ctx.shape, ctx.dtype = weights, w_EFD.shape, w_EFD.dtype
        ctx.save_for_backward(*((getattr(coded, name) for name in KEPT) if ctx.needs_input_grad[1] else ()))
        pairs = zip(layout.rows(coded, groups), _of(weights.forwards, groups), strict=True)
        return groups.gather(multiply(list(pairs), x_PD.dtype), w_EFD.shape[1], x_PD)

    @staticmethod
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[Tensor | None, ...]:
        groups, formats, watch, layout = ctx.groups, ctx.formats, ctx.watch, ctx.layout
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            _note(watch, "grad", grad_PF, formats.grad)
            _note(watch, "dgrad_weight", ctx.weights.weight, formats.dgrad_weight)
            rows = layout.rows(layout.casts().cast_rows(grad_PF, _floor(formats.grad)), groups)
            pairs = list(zip(rows, _of(ctx.weights.backwards, groups), strict=True))
            grad_x = groups.gather(ctx.multiply(pairs, grad_PF.dtype), ctx.shape[2], grad_PF)
        if ctx.needs_input_grad[1]:
            grad_w = _of_weight(ctx, grad_PF)
        return grad_x, grad_w, None, None, None, None, None, None


def _of_weight(ctx: Any, grad_PF: Tensor) -> Tensor:
    """dW of each group: its rows' gradients by its rows, both rounded in blocks along the rows."""
    groups, formats, layout, shape = ctx.groups, ctx.formats, ctx.layout, ctx.shape
    makes = layout.casts()
    taken = Coded(**{name: groups.spread(one) for name, one in zip(KEPT, ctx.saved_tensors, strict=True)})
    grad_QF = groups.spread(grad_PF)
    _note(ctx.watch, "wgrad_grad", grad_QF, formats.wgrad_grad)
    of_grad = layout.columns(makes.cast_columns(grad_QF, _floor(formats.wgrad_grad)), groups)
    of_input = layout.columns(makes.recast_columns(taken, _floor(formats.wgrad_input)), groups)
    parts = ctx.multiply(list(zip(of_grad, of_input, strict=True)), ctx.dtype)
    if len(parts) == shape[0] == 1:
        return parts[0][: shape[1], : shape[2]].unsqueeze(0)
    grad_EFD = torch.zeros(shape, dtype=ctx.dtype, device=grad_PF.device)
    for group, part in zip(groups.spans, parts, strict=True):
        grad_EFD[group] = part[: shape[1], : shape[2]]
    return grad_EFD


def _of(operands: Sequence[Operand], groups: Groups) -> list[Operand]:
    return [operands[group] for group in groups.spans]


def _floor(format: Format | None) -> float:
    assert format is not None  # see `refusal`
    return format.floor


def _note(watch: Watch, operand: str, x: Tensor, format: Format | None) -> None:
    """Notes of x [P, C] by parts of whole blocks along P, or of x [E, ...] by parts of whole matrices."""
    if watch.on and format is not None and x.numel():
        side = format.block[0] if x.dim() == 2 else 1
        for part in x.split(side * max(NOTED // (side * x[0].numel()), 1)):
            coded = encode(part, format)
            watch.note(operand, part, decode(coded, format, x.dtype), coded)
