"""Seconds between marks on one device, for the time split of a step."""

import time

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


def _between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float), "all marks are of one device"
    assert isinstance(end, float), "all marks are of one device"
    return end - start
