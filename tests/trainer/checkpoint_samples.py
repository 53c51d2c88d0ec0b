"""Tensors and processes for the checkpoint tests: contents that are a function of the step, and children that die."""

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer import checkpoint
from trainer.pieces import byte_view, whole
from trainer.writer import Writer


def tensors_of(step: int) -> dict[str, Tensor]:
    """A little of everything, 60 kB: bits that no other step has, NaN payloads among them."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model/embed.weight": torch.randn(64, 96, generator=generator),
        "model/experts.w1": random_bits(torch.bfloat16, (4, 24, 40), generator),
        "model/hc_attn_base": random_bits(torch.float64, (24,), generator),
        "router/bias": torch.randint(-(2**62), 2**62, (1024,), generator=generator),
        "optimizer/steps": torch.tensor(step),
        "empty": torch.empty(0, 7),
    }


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A tensor of any bit pattern the dtype has; booleans are 0 or 1."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def state_of(step: int) -> dict[str, object]:
    """A state as training has it, with numbers that JSON must give back exactly."""
    return {"step": step, "tokens": step * 2**40 + 1, "loss": 1.0 / (step + 3), "cursor": {"rows": [step, -0.0]}}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and byte_view("left", left).tobytes() == byte_view("right", right).tobytes()
    )


def assert_is_step(loaded: checkpoint.Loaded, step: int) -> None:
    """Raises unless this is, to the bit, the checkpoint that was submitted for `step`."""
    wanted = tensors_of(step)
    assert loaded.step == step
    assert list(loaded.tensors) == list(wanted)
    assert all(same_bits(loaded.tensors[name], wanted[name]) for name in wanted)
    assert loaded.state == state_of(step)


def write_for_ever(folder: Path, channel: Connection) -> None:
    """A run in miniature: recovers, goes on from there and saves every step, reporting what is committed."""
    torch.set_num_threads(1)
    found = checkpoint.recover(folder, lambda line: None)
    step = 0 if found is None else found.step
    writer = Writer(folder, keep_last=2, keep_every_steps=0)
    channel.send(step)
    while True:
        step += 1
        live = tensors_of(step)
        writer.submit(step, whole(live), state_of(step))
        for tensor in live.values():
            tensor.zero_()
        if step % 3 == 0:
            writer.wait()
            channel.send(step)


def die_at_operation(number: int, folder: Path, step: int, keep_last: int) -> None:
    """Saves `step` and prunes, but is killed just before its `number`-th change to the file system."""
    torch.set_num_threads(1)
    left = number
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, _fatal(getattr(os, name), lambda: _count()))

    def _count() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    writer = Writer(folder, keep_last=keep_last, keep_every_steps=0)
    writer.submit(step, whole(tensors_of(step)), state_of(step))
    writer.close()


def _fatal(operation: Callable[..., object], before: Callable[[], None]) -> Callable[..., object]:
    def counted(*arguments: object, **options: object) -> object:
        before()
        return operation(*arguments, **options)

    return counted
