"""Single optimizer steps on the tiny model: made-up rows, the parts of a step, all bits before and after."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from model import names
from model.config import AttentionMode
from tests.runs import tiny
from tests.trainer.checkpoint_samples import same_bits
from trainer.build import build
from trainer.config import TrainConfig
from trainer.schedule import StepPlan
from trainer.step import Parts, StepResult, train_step

ROWS, LENGTH = 4, 24
CPU = torch.device("cpu")


def make_batch(seed: int = 1, rows: int = ROWS, length: int = LENGTH) -> Batch:
    """Rows of several documents of 1 to 13 tokens, each with its own amount of padding, some targets masked."""
    draw = torch.Generator().manual_seed(seed)
    made = [_row(length - 3 * row, length, draw) for row in range(rows)]
    token_BT, target_BT, document_BT, position_BT = (torch.stack(parts) for parts in zip(*made, strict=True))
    return Batch(
        token_BT=token_BT,
        target_BT=target_BT,
        document_BT=document_BT,
        position_BT=position_BT,
        source_B=torch.zeros(rows, dtype=torch.int64),
    )


def _row(filled: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_T, target_T, document_T, position_T with `length - filled` tokens of padding."""
    token_T = torch.randint(3, tiny.VOCABULARY, (length,), generator=draw)
    document_T, position_T = torch.full((length,), -1), torch.arange(length)
    at, document = 0, 0
    while at < filled:
        size = min(int(torch.randint(1, 14, (), generator=draw)), filled - at)
        document_T[at : at + size] = document
        position_T[at : at + size] = torch.arange(size)
        at, document = at + size, document + 1
    position_T[filled:] = torch.arange(length - filled)
    target_T = torch.cat((token_T[1:], token_T[:1]))
    ends_T = document_T != torch.cat((document_T[1:], torch.tensor([-2])))
    masked_T = torch.rand(length, generator=draw) < 0.1
    return token_T, target_T.masked_fill(ends_T | masked_T | (document_T < 0), -1), document_T, position_T


def reorder(batch: Batch, order: list[int]) -> Batch:
    """The same rows in another order."""
    return Batch(**{name: getattr(batch, name)[order] for name in Batch.__slots__})


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedStream:
    """A stream that gives the same rows for every step."""

    batch: Batch

    def rows(self, segment: int, first: int, count: int) -> Batch:
        return Batch(**{name: getattr(self.batch, name)[first : first + count] for name in Batch.__slots__})


def make_parts(batch: Batch, dtype: str = "fp32", **changes: Any) -> Parts:
    """The parts of a step over these rows, the model with its initial values; `changes` go to the TrainConfig.

    Biases of the routers start apart, so that a test does not depend on their being equal.
    """
    config: TrainConfig = tiny.with_dtype(tiny.config(Path("none"), Path("none"), **changes), dtype)
    parts = build(config, SimpleNamespace(train=FixedStream(batch=batch)), CPU).parts
    with torch.no_grad():
        for block in parts.model.blocks():
            if not block.ffn.gate.hashed:
                block.ffn.gate.bias.copy_(torch.linspace(-0.01, 0.01, block.ffn.gate.bias.numel()))
    return parts


def make_plan(mode: AttentionMode = "sparse", *, rate: float = 1e-2, mtp_weight: float = 0.3) -> StepPlan:
    """The plan of a step over `make_batch()`."""
    return StepPlan(
        step=0,
        tokens=0,
        rows=ROWS,
        row_length=LENGTH,
        segment=0,
        first_row=0,
        rate=rate,
        attention=mode,
        mtp_weight=mtp_weight,
    )


def take(parts: Parts, plan: StepPlan) -> StepResult:
    """One whole step."""
    return take_any(parts, replace(plan, rows=len(parts.stream.batch.token_BT)))


def take_any(parts: Parts, plan: StepPlan) -> StepResult:
    """One whole step over as many rows as the plan says."""
    result = train_step(parts, plan, lambda: False)
    assert result is not None
    return result


def all_tensors(parts: Parts) -> dict[str, Tensor]:
    """Copies of everything that a step may change: parameters, buffers, the optimizer's state."""
    state = {f"optimizer/{name}": tensor for name, tensor in parts.optimizer.state_dict().items()}
    return {name: tensor.clone() for name, tensor in (names.tensors(parts.model) | state).items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not the same to the bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not same_bits(before[name], after[name])}


def of_group(parts: Parts, group: str) -> set[str]:
    """The parameters of a group and their state in the optimizer."""
    parameters = {name for name, its in parts.groups.items() if its == group}
    state = {f"optimizer/{name}" for name in parts.optimizer.state_dict() if name.partition("/")[2] in parameters}
    return parameters | state
