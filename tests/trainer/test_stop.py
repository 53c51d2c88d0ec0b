"""Proves that ranks stop together, whenever the signal comes, and that only a second Ctrl-C ends at once."""

import os
import signal
from typing import Any

import pytest

from trainer.parallel.world import ALONE
from trainer.stop import Stop, on_signals


class Asking:
    """Two ranks, of which this is the first: the other was asked to stop or was not; meanwhile a signal comes here."""

    def __init__(self, stop: Stop, other: str | None) -> None:
        self.stop, self.other = stop, other

    def agree(self, flag: bool) -> bool:
        self.stop.reason = "SIGTERM"
        return flag or self.other is not None

    def gather(self, thing: Any) -> list[Any]:
        return [thing, self.other]


def test_a_signal_that_comes_while_ranks_ask_each_other_counts_the_next_time() -> None:
    stop = Stop()
    assert not stop.among(Asking(stop, None))
    assert stop.among(Asking(stop, None))


def test_the_reason_is_that_of_the_first_rank_that_has_one() -> None:
    stop = Stop()
    assert stop.among(Asking(stop, "SIGINT"))
    assert stop.reason == "SIGTERM"


def test_one_process_stops_when_it_is_asked_to() -> None:
    stop = Stop()
    assert not stop.among(ALONE)
    stop.reason = "SIGINT"
    assert stop.among(ALONE)


def test_the_first_signal_here_is_not_the_second_because_another_rank_has_told_of_it() -> None:
    stop, before = Stop(), signal.getsignal(signal.SIGINT)
    with on_signals(stop):
        stop.reason = "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGTERM", "all ranks have agreed on it"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
