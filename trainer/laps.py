"""Seconds between marks on one device, for the time split of a step."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class Laps:
    """Marks in the order of the work: clock readings on a CPU, events of its stream on a GPU, waited for by none."""

    def __init__(self, device: torch.device) -> None:
        """Sets the first mark."""
        self._device = device
        self._marks: list[float | torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """The work before this belongs to the lap that ends here."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """The laps between the marks; on a GPU it waits for the last mark's work."""
        if isinstance(self._marks[-1], torch.cuda.Event):
            self._marks[-1].synchronize()
        return [_between(start, end) for start, end in zip(self._marks, self._marks[1:], strict=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PassLaps:
    """The laps of a row's two passes through some layers: forward, backward, sums."""

    forward: Laps
    backward: Laps

    def seconds(self) -> list[float]:
        """All three."""
        return [*self.forward.seconds(), *self.backward.seconds()]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSeconds:
    """Where a step's time went. forward, backward, reduce: summed over rows, divided by the rows side by side.

    pipe: the rest of the rows' time where they go through stages: sending, and waiting for other stages, until this
    rank's last row is done. Waiting for the other ranks to come that far is in no part.
    exchange: bringing the ranks' sums together, and handing out new weights.
    """

    wait: float
    forward: float
    backward: float
    reduce: float
    pipe: float
    exchange: float
    update: float


def seconds_of(whole_step: Laps, rows: Sequence[Laps | PassLaps], threads: int, *, staged: bool) -> StepSeconds:
    """Laps of the step: wait, rows, meeting, reduction, update, publishing; of a row: forward, backward, reduce."""
    wait, whole_rows, _, reduction, update, publishing = whole_step.seconds()
    side_by_side = max(min(threads, len(rows)), 1)
    by_part = zip(*(laps.seconds() for laps in rows), strict=True)
    forward, backward, reduce = (math.fsum(part) / side_by_side for part in by_part) if rows else (0.0, 0.0, 0.0)
    return StepSeconds(
        wait=wait,
        forward=forward,
        backward=backward,
        reduce=reduce,
        pipe=whole_rows - forward - backward - reduce if staged else 0.0,
        exchange=reduction + publishing,
        update=update,
    )


def _between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float), "all marks are of one device"
    assert isinstance(end, float), "all marks are of one device"
    return end - start
