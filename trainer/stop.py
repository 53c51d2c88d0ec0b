"""Stopping a run politely: Ctrl-C and SIGTERM are noted, the loop saves and ends; a second Ctrl-C ends at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.parallel.world import World


class Stop:
    """`reason` is None until something asks the run to stop: then "SIGINT", "SIGTERM" or a step that was reached."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __call__(self) -> bool:
        return self.reason is not None

    def among(self, world: World) -> bool:
        """True on all ranks once one of them was asked to stop; its reason is then everybody's.

        A signal that comes while the ranks ask each other counts the next time: only what all have heard of counts.
        """
        if not world.agree(self()):
            return False
        self.reason = next(reason for reason in world.gather(self.reason) if reason is not None)
        return True


@contextmanager
def on_signals(stop: Stop) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM set `stop.reason`; the old handlers are put back after it.

    Only the second that reaches this process can be a Ctrl-C that ends at once: of the first, others may have told it.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        stop.reason = stop.reason or signal.Signals(number).name

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
