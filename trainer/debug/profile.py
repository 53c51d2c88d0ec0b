"""A profile of chosen steps: a trace for a viewer, what took memory, and a table of the dearest operations.

    RUN/profile/step-000020-000022/   trace.json (.gz if large)   for ui.perfetto.dev or chrome://tracing
                                      memory.json, on a GPU memory.pickle for pytorch.org/memory_viz
                                      table.md    the dearest operations

It covers the time from the beginning of the first step to the end of the last. torch's profiler sees the memory of the
thread that started it only, so the rows of these steps run one after another in that thread; no bit depends on it.
"""

import gzip
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from trainer.build import Built
from trainer.debug import dearest
from trainer.pool import RowPool

TRACE, TABLE, MEMORY, SNAPSHOT = "trace.json", "table.md", "memory.json", "memory.pickle"
LARGE_BYTES = 64 << 20
"""Traces from this size on are compressed; the viewers open both."""
SNAPSHOT_EVENTS = 100_000
"""Allocations that a GPU's memory snapshot remembers; torch's documentation expects several KB each."""
QUIET = "6"
"""The level of libkineto's log that is above everything it says."""


class Profiler:
    """Watches the steps of `profile.steps`; every other step is left alone."""

    def __init__(self, built: Built, run_path: Path, say: Callable[[str], None]) -> None:
        self._built, self._path, self._say = built, run_path, say
        self._wanted = built.config.profile.range()
        self._cuda = built.parts.device.type == "cuda"
        self._open = ExitStack()
        self._profile: Any = None
        self._first = self._done = 0
        self._began = 0.0

    def before(self, step: int) -> None:
        """Before a step, counted from 1: begins a profile if one is wanted from here on."""
        if self._wanted is not None and self._profile is None and self._wanted[0] <= step <= self._wanted[1]:
            self._begin(step)

    def after(self, step: int) -> None:
        """After a whole step: writes the profile if that was its last."""
        self._done = step
        if self._wanted is not None and step == self._wanted[1]:
            self.close()

    def close(self) -> None:
        """Writes the whole steps of a profile that is still open: the run ends within it."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        seconds = time.perf_counter() - self._began
        folder = self._path / "profile" / f"step-{self._first:06d}-{self._done:06d}"
        whole = self._done >= self._first
        if whole:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
        self._open.close()
        if whole:
            self._write(folder, profile, seconds)

    def _begin(self, step: int) -> None:
        self._say(f"profiling from step {step} on; rows run one after another in one thread")
        self._first = step
        self._profile = self._open.enter_context(_recording(self._built.parts.pool, self._cuda))
        self._began = time.perf_counter()

    def _write(self, folder: Path, profile: Any, seconds: float) -> None:
        profile.export_chrome_trace(str(folder / TRACE))
        _compress_if_large(folder / TRACE)
        operations = dearest.operations(profile)
        if not self._cuda:
            alive = dearest.alive(self._built.named_tensors(), profile)
            memory = dearest.memory(profile, operations) | {"largest_tensors_alive_at_the_end": alive}
            (folder / MEMORY).write_text(json.dumps(memory, indent=1))
        title = f"steps {self._first} to {self._done}" if self._done > self._first else f"step {self._first}"
        lines = dearest.table(operations, title, seconds, cuda=self._cuda)
        (folder / TABLE).write_text("\n".join(lines) + "\n")
        self._say("\n".join([*lines, f"profile: {folder}"]))


@contextmanager
def _recording(pool: RowPool, cuda: bool) -> Iterator[Any]:
    """torch's profiler, over rows that run in this thread, with a range for each module's forward pass."""
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with ExitStack() as stack:
        stack.enter_context(pool.one_thread())
        for view in pool.views:
            stack.enter_context(_ranges(view))
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
            stack.callback(torch.cuda.memory._record_memory_history, enabled=None)
        options = {"record_shapes": True, "profile_memory": True}
        yield stack.enter_context(torch.profiler.profile(activities=activities, **options))


@contextmanager
def _ranges(model: nn.Module) -> Iterator[None]:
    """Each module's forward pass is a range of the trace under the module's name."""
    entered: list[record_function] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.append(record_function(names[module]))
        entered[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    names = {module: name or "model" for name, module in model.named_modules()}
    handles = [module.register_forward_pre_hook(enter) for module in names]
    # Also when it raises: what is computed again in the backward pass is left as soon as it is no longer needed.
    handles += [module.register_forward_hook(leave, always_call=True) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert not entered, "every range that was entered was left"


def _compress_if_large(path: Path) -> None:
    if path.stat().st_size < LARGE_BYTES:
        return
    with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb", compresslevel=6) as packed:
        shutil.copyfileobj(plain, packed)
    path.unlink()
