"""What the ranks of a step bring together: their rows, counts and losses; on one process just these."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.batch import Batch
from data.stream import Stream
from model.losses import TermCounts
from trainer import provenance
from trainer.parallel.world import World
from trainer.row import RowSums, join
from trainer.schedule import StepPlan

T = TypeVar("T")
BEAT_S = 1.0
"""How often those who wait for the first rank's reading ask for it (ours); far less than `world.PATIENCE`."""


def read_rows(stream: Stream, plan: StepPlan, mine: Sequence[int | None]) -> Batch:
    """The rows of a step that this rank computes, in order; B may be 0. mine: `mesh.rows_of`."""
    numbers = [index for index in mine if index is not None]
    if len(numbers) == plan.rows:
        return stream.rows(plan.segment, plan.first_row, plan.rows)
    ones = [stream.rows(plan.segment, plan.first_row + index, 1) for index in numbers]
    ones = ones or [stream.rows(plan.segment, plan.first_row, 0)]
    return Batch(**{field.name: torch.cat([getattr(one, field.name) for one in ones]) for field in fields(Batch)})


def read_together(world: World, read: Callable[[], T]) -> T:
    """What `read` returns on each rank: the first rank reads first, and leaves in caches what the others then find.

    Of a new text that takes hours, longer than any collective waits: so they ask again and again whether it has.
    """
    if world.size == 1:
        return read()
    if not world.is_first:
        while not world.agree(False):
            world.beat.mark("reading")
        return read()
    reading = _in_background(read)
    while not wait([reading], BEAT_S).done:
        world.agree(False)
        world.beat.mark("reading")
    found = reading.result()  # before the others are told: where it raises they lose this rank, and read nothing
    world.agree(True)
    return found


def _in_background(work: Callable[[], T]) -> "Future[T]":
    """work() in a thread that ends with the process, so that nobody who interrupts it has to wait."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="read", daemon=True).start()
    return future


def require_alike(world: World, facts: Mapping[str, Any]) -> None:
    """Raise ValueError, on all ranks, where one has other data than the first, or other facts that decide the bits."""
    first, *others = world.gather(dict(facts))
    for rank, found in enumerate(others, 1):
        for key in (*provenance.differing(first, found), "data_fingerprint"):
            if found[key] != first[key]:
                raise ValueError(f"rank {rank} = {key} {found[key]}: expected {first[key]}, as rank 0 has")


def count(world: World, counts: TermCounts) -> TermCounts:
    """The denominators of the whole step."""
    names = [field.name for field in fields(TermCounts)]
    total = torch.tensor([getattr(counts, name) for name in names]) * _tells(world)
    world.control.add(total)
    return TermCounts(**dict(zip(names, total.tolist(), strict=True)))


def _tells(world: World) -> bool:
    """Whether this rank is the one that tells of its rows: the other stages have the same."""
    return world.place.pipe == 0


def add(world: World, number: int) -> int:
    """The sum of integers, each of which tells of a rank's rows."""
    total = torch.tensor(number * _tells(world))
    world.control.add(total)
    return int(total)


def gather_rows(world: World, mine: Mapping[int, RowSums]) -> tuple[tuple[RowSums, ...], Tensor]:
    """The sums of all ranks' rows by number, without their loads, and the loads of all together: load_LE."""
    light = {index: replace(one, load_LE=one.load_LE[:0]) for index, one in mine.items()}
    found: dict[int, list[RowSums]] = {}
    for of_rank in world.gather(light):
        for index, one in of_rank.items():
            found.setdefault(index, []).append(one)
    rows = tuple(join(found[index]) for index in sorted(found))
    load_LE = torch.zeros(len(rows[0].layers), rows[0].load_LE.shape[1], dtype=torch.int64)
    for one in mine.values():
        load_LE[list(one.layers)] += one.load_LE
    world.control.add(load_LE)
    return rows, load_LE
