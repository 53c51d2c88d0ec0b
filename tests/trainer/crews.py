"""Crews for the checkpoint tests: ranks that are threads, ranks that are processes, and layouts drawn at random."""

import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.trainer.checkpoint_samples import random_bits, same_bits, state_of, tensors_of
from trainer import checkpoint, manifest, reader, shard
from trainer.crew import Crew
from trainer.manifest import CheckpointError, count_rows
from trainer.pieces import Piece
from trainer.reader import Reader, restore
from trainer.writer import Writer

PATIENCE_S = 60
FILE_OPERATIONS = ("fsync", "rename", "replace", "mkdir")


class Thread:
    """A rank that is a thread: what is gathered lies in a list, between two barriers."""

    def __init__(self, rank: int, size: int, things: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._things, self._barrier = things, barrier

    def gather(self, thing: Any) -> list[Any]:
        self._things[self.rank] = thing
        self._barrier.wait()
        gathered = list(self._things)
        self._barrier.wait()
        return gathered

    def die(self) -> None:
        """From now on nobody can gather."""
        self._barrier.abort()


class Process:
    """A rank that is a process of a gloo group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, thing: Any) -> list[Any]:
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things


def threads(size: int) -> list[Thread]:
    """The ranks of one crew."""
    things, barrier = [None] * size, threading.Barrier(size, timeout=PATIENCE_S)
    return [Thread(rank, size, things, barrier) for rank in range(size)]


def each(crew: Sequence[Thread], work: Callable[[Thread], Any]) -> list[Any]:
    """What `work` returned, or the CheckpointError or ValueError that it raised, on each rank at the same time."""

    def outcome(rank: Thread) -> Any:
        try:
            return work(rank)
        except (CheckpointError, ValueError) as error:
            return error
        except BaseException:
            rank.die()
            raise

    with ThreadPoolExecutor(len(crew)) as pool:
        return list(pool.map(outcome, crew))


def save(folder: Path, step: int, of_ranks: Sequence[Mapping[str, Sequence[Piece]]]) -> list[Any]:
    """`checkpoint.save` on all ranks at the same time; what it returned or raised on each."""
    return each(
        threads(len(of_ranks)),
        lambda rank: checkpoint.save(folder, step, of_ranks[rank.rank], state_of(step), rank),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Rows of a tensor that a rank has."""

    name: str
    start: int
    stop: int
    rank: int


def spans(tensors: Mapping[str, Tensor], size: int, seed: int) -> list[Span]:
    """Each tensor cut at random rows, each part given to a random rank."""
    draw, found = random.Random(seed), []
    for name, tensor in tensors.items():
        rows = count_rows(tensor.shape)
        cuts = sorted({0, rows, *(draw.randrange(rows + 1) for _ in range(draw.randrange(5)))})
        found += [
            Span(name=name, start=start, stop=stop, rank=draw.randrange(size))
            for start, stop in (pairwise(cuts) if rows else [(0, 0)])
        ]
    draw.shuffle(found)
    return found


def cut(tensors: Mapping[str, Tensor], parts: Sequence[Span], size: int) -> list[dict[str, list[Piece]]]:
    """The pieces of each rank."""
    of_ranks: list[dict[str, list[Piece]]] = [{} for _ in range(size)]
    for part in parts:
        whole = tensors[part.name]
        tensor = whole[part.start : part.stop] if whole.dim() else whole
        piece = Piece(tensor=tensor, shape=tuple(whole.shape), start=part.start)
        of_ranks[part.rank].setdefault(part.name, []).append(piece)
    return of_ranks


def shared_out(step: int, size: int, seed: int) -> list[dict[str, list[Piece]]]:
    """The tensors of a step, on `size` ranks."""
    tensors = many_of(step)
    return cut(tensors, spans(tensors, size, seed), size)


def piece(tensor: Tensor, start: int, stop: int) -> Piece:
    """Rows of a tensor."""
    return Piece(tensor=tensor[start:stop], shape=tuple(tensor.shape), start=start)


def many_of(step: int) -> dict[str, Tensor]:
    """`tensors_of`, and shapes with one row, one column, no element."""
    generator = torch.Generator().manual_seed(step + 10_000)
    more = {
        "one row": random_bits(torch.int16, (1, 33), generator),
        "one column": random_bits(torch.bool, (37, 1), generator),
        "no column": torch.empty(5, 0),
        "experts.w2": random_bits(torch.float32, (7, 5, 3), generator),
    }
    return tensors_of(step) | more


def set_block_bytes(patch: pytest.MonkeyPatch, size: int) -> None:
    """Bytes of a block from here on: with few, every tensor has many, and rows begin anywhere in them."""
    for module in (manifest, reader, shard):
        patch.setattr(module, "BLOCK_BYTES", size)


def wrong_after_restoring(saved: Reader, step: int, size: int, seed: int) -> list[str]:
    """Restore into a layout of `size` ranks drawn by `seed`; the rows that do not have the bits of `step`."""
    wanted = many_of(step)
    empty = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    parts = spans(wanted, size, seed)
    for targets in cut(empty, parts, size):
        restore(saved, targets, wanted.keys())
    return [name for name in wanted if not same_bits(empty[name], wanted[name])]


# ranks that are processes


def start(processes: BaseContext, size: int, work: Callable[..., None], folder: Path, *arguments: Any) -> list[int]:
    """work(crew, folder, *arguments) in `size` processes; their exit codes, and why each failed in `rank-N.failed`."""
    meet = folder / "meet"
    meet.unlink(missing_ok=True)
    children = [
        processes.Process(target=_joined, args=(rank, size, meet, work, folder, *arguments)) for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE_S)
    for child in children:
        child.kill()
        child.join()
    return [child.exitcode or 0 for child in children]


def _joined(rank: int, size: int, meet: Path, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_S)
    )
    try:
        work(Process(rank, size), folder, *arguments)
    except BaseException:
        (folder / f"rank-{rank}.failed").write_text(traceback.format_exc())
        sys.exit(1)


def save_steps(crew: Crew, folder: Path, steps: int, seed: int) -> None:
    """Save steps 1 to `steps`, in the background, cut in another way each."""
    writer = Writer(folder / "checkpoints", keep_last=2, keep_every_steps=0, crew=crew)
    for step in range(1, steps + 1):
        writer.submit(step, shared_out(step, crew.size, seed + step)[crew.rank], state_of(step))
    writer.close()


def read_newest(crew: Crew, folder: Path, step: int, seed: int) -> None:
    """Fail unless the newest checkpoint is that of `step`, to the bit."""
    saved = checkpoint.recover(folder / "checkpoints", print, crew)
    assert saved is not None
    assert (saved.step, saved.state) == (step, state_of(step))
    assert wrong_after_restoring(saved, step, crew.size, seed) == []


def die_while_saving(crew: Crew, folder: Path, step: int, victim: int, operation: int) -> None:
    """Save `step`, but the victim is killed before its `operation`-th change to the file system.

    The others must be told by a CheckpointError, and leave a file that says so.
    """
    if crew.rank == victim:
        _kill_before(operation)
    writer = Writer(folder / "checkpoints", keep_last=3, keep_every_steps=0, crew=crew)
    writer.submit(step, shared_out(step, crew.size, step)[crew.rank], state_of(step))
    try:
        writer.close()
    except CheckpointError as error:
        (folder / f"rank-{crew.rank}.told").write_text(str(error))


def _kill_before(operation: int) -> None:
    left = operation

    def count() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    for name in FILE_OPERATIONS:
        setattr(os, name, _after(count, getattr(os, name)))


def _after(before: Callable[[], None], operation: Callable[..., object]) -> Callable[..., object]:
    def counted(*arguments: object, **options: object) -> object:
        before()
        return operation(*arguments, **options)

    return counted
