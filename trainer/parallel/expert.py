"""Expert parallelism: the ranks of an expert group share out each layer's experts and send each other tokens.

Every rank computes a row of its own; all rows of a round have one length. A row's token-expert pairs are sorted by
expert, as on one process, and go to the ranks that hold the experts; results come back the same way, so a token's K
results are added in the order in which the router chose them. No pair is dropped; a rank may get none.

Exact path (`RowExperts`): what has arrived is computed row by row, one product per (expert, row), with leaves of the
weights for each row: they leave one gradient per (expert, row), which the exact sums take as they would on one process.
Fast path (`MergedExperts`): pairs of all rows are sorted by expert, one product per expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.block import Block
from model.dispatch import Dispatched, LocalDispatcher
from model.experts import Experts
from model.gather import take
from model.transformer import Transformer
from trainer.parallel.world import Group
from trainer.precision.wire import Codes


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrived:
    """Pairs for the experts held here, by row and within it by expert: x_PD, weight_P, and how many of each.

    counts: of (row, expert), rows in the order of the group. local: this rank's own pairs before they were sent.
    sent, received: pairs per rank of the group.
    """

    x_PD: Tensor
    weight_P: Tensor
    counts: list[int]
    local: Dispatched
    sent: list[int]
    received: list[int]


class ExpertDispatcher:
    """In place of `LocalDispatcher`; every rank of the group calls both methods, and their backward passes, alike.

    codes: what tokens are sent as, where the experts round them to that format anyway; None: as they are. Results and
    gradients travel as they are.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._local = LocalDispatcher()
        self.codes: Codes | None = None

    def dispatch(self, x_BTD: Tensor, expert_BTK: Tensor, weight_BTK: Tensor, experts: int) -> Arrived:
        """Send each pair to the rank of its expert; `experts`: all of the layer's."""
        local = self._local.dispatch(x_BTD, expert_BTK, weight_BTK, experts)
        mine = torch.tensor(local.counts, device=x_BTD.device).unflatten(0, (self._group.size, -1))
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self._group.handle)
        sent, received = mine.sum(1).tolist(), theirs.sum(1).tolist()
        return Arrived(
            x_PD=exchange(local.x_PD, sent, received, self._group.handle, self.codes),
            weight_P=exchange(local.weight_P, sent, received, self._group.handle),
            counts=theirs.flatten().tolist(),
            local=local,
            sent=sent,
            received=received,
        )

    def combine(self, y_PD: Tensor, dispatched: Arrived, shape: torch.Size) -> Tensor:
        """Send the results back and add them up as `LocalDispatcher.combine` does."""
        y_PD = exchange(y_PD, dispatched.received, dispatched.sent, self._group.handle)
        return self._local.combine(y_PD, dispatched.local, shape)


def exchange(x_PD: Tensor, sent: list[int], received: list[int], group: Any, codes: Codes | None = None) -> Tensor:
    """Consecutive rows of x to each rank of the group: sent[r] go to rank r, received[r] come from it, in order.

    The backward pass is the way back, without codes.
    """
    return _Exchange.apply(x_PD, sent, received, group, codes)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, sent: list[int], received: list[int], group: Any, codes: Codes | None
    ) -> Tensor:
        ctx.way = sent, received, group
        if codes is None:
            return _send(x_PD, sent, received, group)
        return codes.read(_send(codes.write(x_PD), sent, received, group), x_PD)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.way
        return _send(grad_PD, received, sent, group), None, None, None, None


def _send(x_PD: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out_PD = x_PD.new_empty(sum(received), *x_PD.shape[1:])
    dist.all_to_all_single(out_PD, x_PD.contiguous(), received, sent, group=group)
    return out_PD


class RowExperts(Experts):
    """The experts held here, computed row by row. leaves: (w1, w3, w2) for each row of the group, over one storage."""

    def __init__(self, experts: Experts, rows: int) -> None:
        nn.Module.__init__(self)
        self.held, self.limit = experts.held, experts.limit
        self.grouped_matmul, self.swiglu = experts.grouped_matmul, experts.swiglu
        self.w1, self.w3, self.w2 = experts.w1, experts.w3, experts.w2
        weights = (self.w1, self.w3, self.w2)
        self.leaves = [tuple(nn.Parameter(weight.detach()) for weight in weights) for _ in range(rows)]

    def forward(self, x_PD: Tensor, weight_P: Tensor, counts: list[int]) -> Tensor:
        """counts: of (row, expert)."""
        by_row = [counts[first : first + len(self.held)] for first in range(0, len(counts), len(self.held))]
        sizes = [sum(of_row) for of_row in by_row]
        rows = zip(x_PD.split(sizes), weight_P.split(sizes), by_row, self.leaves, strict=True)
        return torch.cat([self._row(*of_row) for of_row in rows])

    def _row(self, x_PD: Tensor, weight_P: Tensor, counts: list[int], leaves: Sequence[nn.Parameter]) -> Tensor:
        w1, w3, w2 = leaves
        gate_PF, up_PF = self.grouped_matmul(x_PD, w1, counts), self.grouped_matmul(x_PD, w3, counts)
        return self.grouped_matmul(self.swiglu(gate_PF, up_PF, weight_P, self.limit), w2, counts)


class MergedExperts(Experts):
    """The experts held here, one product per expert over the pairs of all rows."""

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.held, self.limit = experts.held, experts.limit
        self.grouped_matmul, self.swiglu = experts.grouped_matmul, experts.swiglu
        self.w1, self.w3, self.w2 = experts.w1, experts.w3, experts.w2

    def forward(self, x_PD: Tensor, weight_P: Tensor, counts: list[int]) -> Tensor:
        """counts: of (row, expert); the pairs of an expert keep the order of the rows."""
        number = len(self.held)
        expert_P = torch.arange(number).repeat(len(counts) // number).repeat_interleave(torch.tensor(counts))
        order_P = torch.sort(expert_P.to(x_PD.device), stable=True).indices
        back_P = torch.argsort(order_P)
        by_expert = [sum(counts[expert::number]) for expert in range(number)]
        y_PD = super().forward(take(x_PD, order_P, back_P), take(weight_P, order_P, back_P), by_expert)
        return take(y_PD, back_P, order_P)


def apply_experts(model: Transformer, group: Group, *, exact: bool) -> None:
    """Set the dispatcher and the experts of every layer; the model holds this rank's experts only."""
    for block in model.blocks():
        block.ffn.dispatcher = ExpertDispatcher(group)
        experts = block.ffn.experts
        block.ffn.experts = RowExperts(experts, group.size) if exact else MergedExperts(experts)
    model.add_module("stand_by", StandBy(model))


def leaves(model: Transformer) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """Every tensor that a backward pass leaves a gradient in: its name, itself, and whose row it is of, in the group.

    None: this rank's own. The rows' leaves of the experts' weights come in the order of the rows.
    """
    for name, parameter in model.named_parameters():
        yield name, parameter, None
    for name, module in model.named_modules():
        if isinstance(module, RowExperts):
            for row, of_row in enumerate(module.leaves):
                for weight, leaf in zip(("w1", "w3", "w2"), of_row, strict=True):
                    yield f"{name}.{weight}", leaf, row


class StandBy(nn.Module):
    """Takes part in the other ranks' exchanges of one row without a row of one's own: sends nothing, computes for them.

    A module without parameters, so that what watches forward passes can watch this one too.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self._model = [model]  # in a list: not a part of this module, which is a part of the model

    def forward(self, layers: range | None = None, *, backward: bool) -> Tensor:
        """Walks the layers through the model's own seams, so that recomputation asks for the same exchanges again."""
        (model,) = self._model
        layers = range(model.config.num_hidden_layers) if layers is None else layers
        h_BTD = torch.zeros(1, 0, model.config.hidden_size, dtype=model.dtype, device=model.device)
        h_BTD.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            for block in model.stretch(layers):
                h_BTD = model.run_block(_Experts(block), h_BTD)
            for block in model.branches() if layers.stop == model.config.num_hidden_layers else ():
                h_BTD = _Experts(block)(h_BTD)
        return h_BTD


def stand_by(model: Transformer, layers: range | None = None, *, backward: bool) -> Tensor:
    """The turn of a rank that has no row, through these layers; the others' backward pass needs that of the result."""
    standing = next(module for module in model.modules() if isinstance(module, StandBy))
    return standing(layers, backward=backward).sum()


class _Experts(nn.Module):
    """A layer's mixture of experts alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = [block]  # in a list: its parameters are the model's

    def forward(self, h_BTD: Tensor) -> Tensor:
        (block,) = self._block
        assert isinstance(block, Block)
        none_BT = torch.zeros(h_BTD.shape[:2], dtype=torch.int64, device=h_BTD.device)
        y_BTD, _ = block.run_ffn(block.ffn, h_BTD, none_BT, none_BT)
        return y_BTD
