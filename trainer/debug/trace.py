"""Every tensor that passes a module boundary while one row is computed, forwards and backwards, in order.

Hooks only look: the row is computed by the same call as in training and has the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.batch import Batch
from model.config import AttentionMode
from model.transformer import Output, Transformer
from trainer import row
from trainer.debug import documents
from trainer.parallel.reduce import LIMIT
from trainer.row import RowSums, Weights
from trainer.step import learn

Phase = Literal["weight", "forward", "loss", "backward"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One tensor. largest: of the finite |values|. bad: how many elements are not finite; `index`, `found` the first.

    tensor: "input", "output", "weight NAME", or "gradient of" one of these. tokens: positions in the row at which
    something is not finite, where the tensor has such an axis. A parameter's gradient is also bad from LIMIT on.
    """

    phase: Phase
    module: str
    tensor: str
    shape: tuple[int, ...]
    largest: float
    bad: int = 0
    index: tuple[int, ...] = ()
    found: str = ""
    tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The tensor's full name, such as "output of layers.1.attn.wq_a" or "gradient of weight head.weight"."""
        if self.phase == "loss":
            return self.tensor
        kind, _, own = self.tensor.rpartition("weight ")
        if own != self.tensor:
            return f"{kind}weight {self.module}.{own}".replace(" .", " ")
        return f"{self.tensor} of {self.module}"


def trace(model: Transformer, one: Batch, mode: AttentionMode, weights: Weights) -> list[Event]:
    """Compute a row (a batch of one) forwards and backwards and tell of each tensor in order, weights first.

    Which parameters have gradients is as `step.train_only` left it; no gradient stays behind.
    """
    recorder = _Recorder(one.token_BT.shape[1])
    with recorder.watching(model):
        sums = learn(model, one, mode, weights)
    model.zero_grad(set_to_none=True)
    assert recorder.output is not None, "the row went through the model"
    return [*_weights(model), *recorder.forward, *_losses(model, recorder.output, one, sums), *recorder.backward]


def _weights(model: Transformer) -> Iterator[Event]:
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.is_floating_point():
            module, _, own = name.rpartition(".")
            yield _event("weight", module, f"weight {own}", weight.detach())


class _Recorder:
    """The events of one row. A module that is computed again in the backward pass is told of once."""

    def __init__(self, row_length: int) -> None:
        self.forward: list[Event] = []
        self.backward: list[Event] = []
        self.output: Output | None = None
        self._row_length = row_length

    @contextmanager
    def watching(self, model: Transformer) -> Iterator[None]:
        handles: list[RemovableHandle] = [model.register_forward_hook(self._keep_output)]
        for name, module in model.named_modules():
            if not name:
                continue  # its tensors are those of its last modules
            handles.append(module.register_forward_pre_hook(partial(self._see_input, name)))
            handles.append(module.register_forward_hook(partial(self._see_output, name)))
        for name, weight in model.named_parameters():
            module, _, own = name.rpartition(".")
            if weight.requires_grad:
                handles.append(weight.register_hook(self._gradient_of(module, f"weight {own}", LIMIT)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep_output(self, model: nn.Module, inputs: Any, output: Output) -> None:
        self.output = output

    def _see_input(self, name: str, module: nn.Module, inputs: Any) -> None:
        for label, tensor in _tensors(inputs[0] if len(inputs) == 1 else list(inputs), "input"):
            self._see(name, label, tensor)

    def _see_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for label, tensor in _tensors(output, "output"):
            self._see(name, label, tensor)

    def _see(self, name: str, label: str, tensor: Tensor) -> None:
        if self.backward:
            return
        self.forward.append(self._token_event("forward", name, label, tensor.detach()))
        if tensor.requires_grad and tensor.grad_fn is not None:
            tensor.register_hook(self._gradient_of(name, label))

    def _gradient_of(self, name: str, label: str, limit: float = torch.inf) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            self.backward.append(self._token_event("backward", name, f"gradient of {label}", gradient, limit))

        return see

    def _token_event(self, phase: Phase, name: str, label: str, tensor: Tensor, limit: float = torch.inf) -> Event:
        """Compressed entries have an axis of their own; everything else with rows has tokens behind them."""
        of_row = tensor.dim() > 1 and tensor.shape[0] == 1 and self._row_length - tensor.shape[1] in (0, 1)
        compressed = {"compressor", "indexer"} & set(name.split("."))
        return _event(phase, name, label, tensor, limit, has_tokens=of_row and not compressed)


def _tensors(value: Any, label: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in what a module takes or gives, each with a name."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield label, value
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _tensors(item, label if number == 0 else f"{label}[{number}]")
    elif is_dataclass(value) and label.startswith("output"):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name), f"{label}.{field.name}")


@torch.no_grad()
def _event(
    phase: Phase, module: str, label: str, tensor: Tensor, limit: float = torch.inf, *, has_tokens: bool = False
) -> Event:
    shape = tuple(tensor.shape)
    size, good = tensor.abs(), tensor.abs() < limit
    largest = float(torch.where(size < torch.inf, size, 0).max()) if size.numel() else 0.0
    bad = good.numel() - int(good.sum())
    if not bad:
        return Event(phase=phase, module=module, tensor=label, shape=shape, largest=largest)
    index = tuple(int(axis[0]) for axis in (~good).nonzero(as_tuple=True)) if shape else ()
    tokens = (~good).flatten(2).any(-1)[0] if has_tokens and len(shape) > 2 else None
    return Event(
        phase=phase, module=module, tensor=label, shape=shape, largest=largest, bad=bad, index=index,
        found=f"{float(tensor[index]):g}", tokens=() if tokens is None else tuple(tokens.nonzero().flatten().tolist()),
    )  # fmt: skip


def _losses(model: Transformer, output: Output, one: Batch, sums: RowSums) -> Iterator[Event]:
    """The two losses behind the heads; where one is not finite, with the tokens of the documents that make it so."""
    for number, (name, loss) in enumerate((("lm", sums.lm), ("mtp", sums.mtp))):
        event = _event("loss", "", f"loss/{name}", torch.tensor(loss, dtype=torch.float64))
        tokens = []
        for span in documents.spans(one) if event.bad else ():
            losses = row.heads(model, _cut(output, span), documents.cut(one, span))
            if not losses[number].isfinite():
                tokens += range(span.start, span.stop)
        yield replace(event, tokens=tuple(tokens))


def _cut(output: Output, span: slice) -> Output:
    branch_BTD, h_BTD = output.mtp_h_BTD, output.h_BTD
    assert h_BTD is not None, "the whole model ran"
    if branch_BTD is not None:
        branch_BTD = branch_BTD[:, span.start : span.stop - 1]
    return Output(x_BTND=None, h_BTD=h_BTD[:, span], mtp_h_BTD=branch_BTD, layers=(), mtp=None)
