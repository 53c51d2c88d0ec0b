"""A pipeline's schedule played through in numbers: when each action happens, who waits, what is kept, what is sent.

The orders are those of `trainer.parallel.orders`. A rank does one thing at a time; a transfer begins when both sides
have come to it and holds both until it ends, as DeepSpeed's sends do.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.parallel.orders import Action, Group, Order, Way, passes

Amount = float
"""Of time: seconds, FLOP, whatever the profile is in."""
Side = tuple[Way, int, int, bool]
"""Of a transfer: what travels, the row, the chunk that takes it in, and whether this is the sender's side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What a row takes: forwards and backwards through each chunk, and its streams from one rank to the next."""

    forward: tuple[Amount, ...]
    backward: tuple[Amount, ...]
    transfer: Amount = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A group of actions of a rank, from when the rank comes to it until it is done."""

    rank: int
    group: Group
    start: Amount
    end: Amount

    @property
    def computed(self) -> Action | None:
        """The pass, if it is one."""
        return self.group[0] if self.group[0].act == "pass" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A schedule played through. events: of each rank, in order."""

    events: tuple[tuple[Event, ...], ...]

    @property
    def end(self) -> Amount:
        """When the last rank is done."""
        return max(event.end for events in self.events for event in events)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """By rank: the share of the time in which it computes nothing."""
        return tuple(1 - _busy(events) / self.end for events in self.events)

    @property
    def bubble(self) -> float:
        """Of all ranks together."""
        return sum(self.bubbles) / len(self.events)


def simulate(orders: Sequence[Order], profile: Profile) -> Run:
    """Play the orders of all ranks through. Orders in which ranks wait for each other for ever are an AssertionError.

    A transfer takes `profile.transfer` from when both ranks are there, however many there are at a time; a group of
    them is done when all are.
    """
    events: list[list[Event]] = [[] for _ in orders]
    came: dict[Side, Amount] = {}
    clock, waiting = [0.0 for _ in orders], list(range(len(orders)))
    while waiting:
        before = sum(map(len, events))
        for rank in waiting:
            while len(events[rank]) < len(orders[rank]):
                group, start = orders[rank][len(events[rank])], clock[rank]
                came.update((_side(action), start) for action in group if action.act != "pass")
                end = _end(group, start, came, profile)
                if end is None:
                    break
                events[rank].append(Event(rank=rank, group=group, start=start, end=end))
                clock[rank] = end
        waiting = [rank for rank in waiting if len(events[rank]) < len(orders[rank])]
        assert not waiting or sum(map(len, events)) > before, _stuck(orders, events, waiting)
    return Run(events=tuple(map(tuple, events)))


def _end(group: Group, start: Amount, came: Mapping[Side, Amount], profile: Profile) -> Amount | None:
    """When a group that its rank has come to is done; None while another rank is not there."""
    if group[0].act == "pass":
        durations = profile.forward if group[0].way == "forward" else profile.backward
        return start + durations[group[0].chunk]
    others = [came.get(_side(action, other=True)) for action in group]
    here = [other for other in others if other is not None]
    return max(start, *here) + profile.transfer if len(here) == len(group) else None


def _side(action: Action, *, other: bool = False) -> Side:
    step = 0 if action.act == "receive" else 1 if action.way == "forward" else -1
    return action.way, action.row, action.chunk + step, (action.act == "send") != other


def _stuck(orders: Sequence[Order], events: Sequence[Sequence[Event]], waiting: Sequence[int]) -> str:
    at = (f"rank {rank} at {' '.join(map(str, orders[rank][len(events[rank])]))}" for rank in waiting)
    return f"ranks wait for each other: {', '.join(at)}"


def _busy(events: Sequence[Event]) -> Amount:
    return sum(event.end - event.start for event in events if event.computed)


def in_flight(order: Order) -> int:
    """The most rows, counted once for each chunk, that a rank has taken forward and not yet begun to take back."""
    return kept(order, defaultdict(lambda: 1))


def kept(order: Order, waiting: Mapping[int, int], passing: Mapping[int, int] | None = None) -> int:
    """The most that rows in flight take on a rank. Both by number of the chunk.

    waiting: of a row between its passes. passing: of one while it is on its way back, default as much.
    """
    now = most = 0
    for action in passes(order):
        size = waiting[action.chunk]
        if action.way == "forward":
            now += size
            most = max(most, now)
        else:
            now -= size
            most = max(most, now + (passing or waiting)[action.chunk])
    return most


def sends(order: Order) -> Counter[Way]:
    """How often a rank sends streams (forward) and gradients of streams (backward)."""
    return Counter(action.way for group in order for action in group if action.act == "send")
