"""Proves that real ranks pass, send and receive in the order of the tables, in training and in measuring."""

import json
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist import ranks
from trainer.parallel.mesh import Mesh
from trainer.parallel.orders import Group, Order, Schedule, chunks_of_rank, forward_order, training_order
from trainer.parallel.world import start

SHAPE = (1, 2, 2, 3)
Told = list[list[str]]
"""Groups of what was done: names of passes as in the tables, sends and receives without the row that they are of."""


class Recorder:
    """Passes that compute nothing: zeros go forth and back. Chunks have a layer each."""

    def __init__(self, told: Told, chunks: int) -> None:
        self._told, self._last, self._came = told, chunks - 1, dict[tuple[int, int], Tensor | None]()

    def forward(self, turn: int, layers: range, x_BTND: Tensor | None) -> Tensor:
        self._told.append([f"F{turn}.{layers.start}"])
        self._came[turn, layers.start] = x_BTND
        return torch.zeros(()) if layers.start == self._last else torch.zeros(SHAPE)

    def backward(self, turn: int, layers: range, grad_BTND: Tensor | None) -> None:
        self._told.append([f"B{turn}.{layers.start}"])
        came = self._came.pop((turn, layers.start))
        if came is not None:
            came.grad = torch.zeros_like(came)


def watch(told: Told) -> None:
    """Note what DeepSpeed sends and receives, one by one or in batches; shapes, which are integers, are not noted."""

    def alone(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(tensor: Tensor, *given: Any, **named: Any) -> Any:
            if tensor.is_floating_point():
                told.append([name])
            return function(tensor, *given, **named)

        return moved

    def batch(transfers: list[Any]) -> Any:
        kinds = {"isend": "send", "irecv": "receive"}
        told.append([kinds[one.op.__name__] for one in transfers if one.tensor.is_floating_point()])
        return together(transfers)

    together = dist.batch_isend_irecv
    for name, function in (("send", "send"), ("receive", "recv")):
        setattr(dist, function, alone(name, getattr(dist, function)))
    dist.batch_isend_irecv = batch


def tell(rank: int, folder: Path, schedule: Schedule, size: int, rows: int) -> None:
    """What a rank does: with backward passes, then without."""
    from trainer.engine import Column, engine

    world = start(Mesh(pipe=size), ranks.placement(rank, size, folder), ranks.CPU)
    own = chunks_of_rank(schedule, size, rank)
    column = Column(
        ranks=world.column.ranks,
        stage=rank,
        layers=tuple(range(chunk, chunk + 1) for chunk in own),
        device=ranks.CPU,
    )
    executor, told, found = engine(schedule, column), Told(), []
    watch(told)
    for run in (executor.learn, executor.measure):
        run(Recorder(told, size if schedule == "1f1b" else 2 * size), range(rows), SHAPE)
        found.append(list(told))
        told.clear()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    world.close()


def listed(order: Order) -> Told:
    """A table as it is to be told."""
    return [_names(group) for group in order]


def _names(group: Group) -> list[str]:
    return [str(one) if one.act == "pass" else one.act for one in group]


@pytest.mark.parametrize(
    ("schedule", "size", "rows"),
    [
        ("1f1b", 2, 5),
        ("dualpipev", 2, 5),
        pytest.param("1f1b", 4, 3, marks=pytest.mark.slow),
        pytest.param("1f1b", 3, 9, marks=pytest.mark.slow),
        pytest.param("dualpipev", 4, 11, marks=pytest.mark.slow),
    ],
)
def test_ranks_do_what_the_tables_say(
    schedule: Schedule, size: int, rows: int, processes: BaseContext, tmp_path: Path
) -> None:
    ranks.spawn(processes, tell, size, tmp_path, schedule, size, rows)
    for rank in range(size):
        learned, measured = json.loads((tmp_path / f"{rank}.json").read_text())
        assert learned == listed(training_order(schedule, size, rank, rows))
        assert measured == listed(forward_order(schedule, size, rank, rows))
