"""Rows at the same time on a CPU: each thread has its own view of the model and one core.

Rows meet only in the exact sums, which know no order, and no product is ever cut between threads: so the number of
threads changes the speed of a run and none of its bits.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

from model.transformer import Transformer

Item = TypeVar("Item")
Result = TypeVar("Result")


class RowPool:
    """`threads` views of one model; on a GPU one thread, which is the caller's own."""

    def __init__(self, model: Transformer, threads: int) -> None:
        self.model = model
        self._views: SimpleQueue[Transformer] = SimpleQueue()
        self.views = (model, *(view_of(model) for _ in range(threads - 1)))
        for view in self.views:
            self._views.put(view)
        # Intra-op threads are counted per thread: each of these gets one.
        self._executor = (
            ThreadPoolExecutor(threads, "row", initializer=torch.set_num_threads, initargs=(1,))
            if threads > 1
            else None
        )

    def map(self, work: Callable[[Transformer, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """work(a view of the model, item) for each item, results in the items' order; the first error is raised."""

        def run(item: Item) -> Result:
            view = self._views.get()
            try:
                return work(view, item)
            finally:
                self._views.put(view)

        return self.plain_map(run, items)

    @property
    def width(self) -> int:
        """Rows that are computed at the same time."""
        return len(self.views) if self._executor else 1

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Within the block rows run one after another in the caller's thread, which a profiler can follow."""
        executor, self._executor = self._executor, None
        try:
            yield
        finally:
            self._executor = executor

    def plain_map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`map` over the same threads, for work that needs no model."""
        return self._executor.map(work, items) if self._executor else map(work, items)


def view_of(model: Transformer) -> Transformer:
    """A second model over the same storage: its parameters have gradients of their own, its buffers are the same."""
    with torch.device("meta"):
        view = Transformer(model.config, model.dtype, model.held, model.numbers)
    for mine, original in zip(view.modules(), model.modules(), strict=True):
        for name, parameter in original.named_parameters(recurse=False):
            setattr(mine, name, nn.Parameter(parameter.detach()))  # of the same version, too
        for name, buffer in original.named_buffers(recurse=False):
            setattr(mine, name, buffer)
    return view
