"""Pipeline parallelism: the ranks of a column share out the layers and hand each other the streams of a row.

`trainer.engine` has the schedules and the sends; here is what a schedule needs to know of the model, and how streams go
through all stages outside a training step, for a sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.layers import at_least_fp32
from model.transformer import Transformer
from trainer.engine import Column, Engine, engine
from trainer.parallel.world import Group
from trainer.passes import Learning, Measuring, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """A stage and its schedule. chunks: the layers of all chunks in order; owners: the stages that have them."""

    model: Transformer
    travels: torch.dtype
    chunks: tuple[range, ...]
    owners: tuple[int, ...]
    column: Group
    engine: Engine

    def stage(self, row_length: int) -> Stage:
        """What passes over rows of this length need to know."""
        config = self.model.config
        return Stage(model=self.model, shape=(1, row_length, config.hc_mult, config.hidden_size), travels=self.travels)

    def learn(self, passes: Learning, turns: Sequence[int], row_length: int) -> None:
        """Forward and backward passes of these turns; all ranks of the column call this alike."""
        self.engine.learn(passes, turns, self.stage(row_length).shape)

    def measure(self, passes: Measuring, turns: Sequence[int], row_length: int) -> None:
        """Forward passes alone."""
        self.engine.measure(passes, turns, self.stage(row_length).shape)

    def relay(
        self,
        model: Transformer,
        token_BT: Tensor,
        advance: Callable[[range, Tensor], Tensor],
        end: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """In place of `model.transformer.relay`: each chunk where it is; all ranks get the result, [B, V]."""
        config, device = model.config, model.device
        shape = (*token_BT.shape, config.hc_mult, config.hidden_size)
        x_BTND = model.streams(token_BT) if model.is_first else torch.empty(shape, dtype=model.dtype, device=device)
        x_BTND = self.chain(x_BTND, advance)
        nothing_BV = torch.empty(len(token_BT), config.vocab_size, dtype=model.dtype, device=device)
        logits_BV = end(x_BTND) if model.is_last else at_least_fp32(nothing_BV)
        dist.broadcast(logits_BV, self.column.ranks[self.owners[-1]], group=self.column.handle)
        return logits_BV

    def chain(self, x: Tensor, advance: Callable[[range, Tensor], Tensor]) -> Tensor:
        """A tensor through all chunks in order: x = advance(layers, x) where these are, then on to the next.

        x counts where the first chunk is; elsewhere it has the shape and type of what comes. The result is where the
        last chunk is; elsewhere it means nothing.
        """
        mine, group = self.column.index, self.column
        for number, (layers, owner) in enumerate(zip(self.chunks, self.owners, strict=True)):
            before = self.owners[number - 1] if number else owner
            if mine == before != owner:
                dist.send(x.contiguous(), group.ranks[owner], group=group.handle)
            if mine == owner:
                if before != owner:
                    x = torch.empty_like(x)
                    dist.recv(x, group.ranks[before], group=group.handle)
                x = advance(layers, x)
        return x


def pipeline(
    model: Transformer, schedule: str, chunks: Sequence[range], column: Group, travels: torch.dtype
) -> Pipeline:
    """The stage of this rank; all ranks of the column call this alike. travels: see `Stage`."""
    stages = column.size
    owners = tuple(min(chunk, 2 * stages - 1 - chunk) for chunk in range(len(chunks)))
    mine = tuple(layers for layers, owner in zip(chunks, owners, strict=True) if owner == column.index)
    where = Column(ranks=column.ranks, stage=column.index, layers=mine, device=model.device)
    return Pipeline(
        model=model,
        travels=travels,
        chunks=tuple(chunks),
        owners=owners,
        column=column,
        engine=engine(schedule, where),
    )
