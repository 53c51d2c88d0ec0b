"""Proves that a schedule played through has the known bubbles and rows in flight, and breaks no law of time.

Oracles: closed forms of 1F1B, cases small enough to be drawn by hand, and properties of any run.
"""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.parallel.orders import Action, Order, Schedule, passes, rank_of_chunk, training_order
from trainer.parallel.simulate import Profile, Run, in_flight, kept, sends, simulate

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "dualpipev")


def orders_of(schedule: Schedule, ranks: int, rows: int) -> list[Order]:
    return [training_order(schedule, ranks, rank, rows) for rank in range(ranks)]


def even(chunks: int, forward: float, backward: float, transfer: float = 0.0) -> Profile:
    return Profile(forward=(forward,) * chunks, backward=(backward,) * chunks, transfer=transfer)


@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 2), (2, 1), (3, 8)])
@pytest.mark.parametrize(("ranks", "rows"), [(2, 1), (2, 5), (3, 2), (4, 4), (4, 19), (8, 32), (16, 64)])
def test_1f1b_of_equal_stages_has_the_known_bubble(ranks: int, rows: int, forward: int, backward: int) -> None:
    """Every rank is idle while P - 1 rows' worth of passes fill and empty the pipeline (Narayanan et al. 2019)."""
    run = simulate(orders_of("1f1b", ranks, rows), even(ranks, forward, backward))
    assert run.end == (rows + ranks - 1) * (forward + backward)
    for share in (run.bubble, *run.bubbles):
        assert share == pytest.approx((ranks - 1) / (rows + ranks - 1), abs=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 30])
def test_1f1b_keeps_as_many_rows_as_stages_are_left(rows: int) -> None:
    found = [in_flight(order) for order in orders_of("1f1b", 5, rows)]
    assert found == [min(5 - rank, rows) for rank in range(5)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_dualpipev_has_less_bubble_and_keeps_the_same_everywhere(ranks: int) -> None:
    """With halves of the chunks; 2 P + 1 halves of rows in flight on each rank, with passes one after the other."""
    rows = 4 * ranks
    orders = orders_of("dualpipev", ranks, rows)
    assert [in_flight(order) for order in orders] == [2 * ranks + 1] * ranks
    halves = simulate(orders, even(2 * ranks, 0.5, 1))
    assert halves.bubble < simulate(orders_of("1f1b", ranks, rows), even(ranks, 1, 2)).bubble
    busy = {sum(event.end - event.start for event in events if event.computed) for events in halves.events}
    assert busy == {3.0 * rows}


def test_two_ranks_by_hand() -> None:
    """Forward 1 and 2, backward 3 and 1, transfer 1/2: drawn on paper."""
    profile = Profile(forward=(1, 2), backward=(3, 1), transfer=0.5)
    run = simulate(orders_of("1f1b", 2, 2), profile)
    first, second = [[(str(e.computed), e.start, e.end) for e in events if e.computed] for events in run.events]
    assert first == [("F0.0", 0, 1), ("F1.0", 1.5, 2.5), ("B0.0", 5.5, 8.5), ("B1.0", 9, 12)]
    assert second == [("F0.1", 1.5, 3.5), ("B0.1", 3.5, 4.5), ("F1.1", 5.5, 7.5), ("B1.1", 7.5, 8.5)]
    waits = [(" ".join(map(str, e.group)), e.start, e.end) for e in run.events[0] if not e.computed]
    assert waits == [("F0.0>", 1, 1.5), ("<B0.0", 2.5, 5), ("F1.0>", 5, 5.5), ("<B1.0", 8.5, 9)]
    assert run.end == 12
    assert run.bubbles == pytest.approx((1 - 8 / 12, 1 - 6 / 12))
    assert run.bubble == pytest.approx(1 - 14 / 24)


def test_bytes_are_of_the_rows_that_wait_in_each_chunk() -> None:
    """Rank 0 of DualPipeV on two ranks: its first chunk fills before the last one, which empties first."""
    (first, last) = (Action(act="pass", way="forward", row=0, chunk=chunk) for chunk in (0, 3))
    order = ((first,), (replace(first, row=1),), (last,), (replace(last, way="backward"),), (replace(last, row=1),))
    assert kept(order, {0: 10, 3: 1}) == 21
    assert kept(order, {0: 1, 3: 10}) == 12
    assert in_flight(order) == 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_streams_pass_each_border_once_each_way(schedule: Schedule) -> None:
    """1F1B: one neighbour or two. DualPipeV: out and back, twice as many; the last rank hands on to itself."""
    counts = [sends(order) for order in orders_of(schedule, 4, 9)]
    forward, backward = [count["forward"] for count in counts], [count["backward"] for count in counts]
    assert forward == ([9, 9, 9, 0] if schedule == "1f1b" else [9, 18, 18, 9])
    assert backward == ([0, 9, 9, 9] if schedule == "1f1b" else [9, 18, 18, 9])


def check_time(run: Run, ranks: int, profile: Profile) -> None:
    """No rank does two things at once, none goes back in time, nothing is used before it is there."""
    done: dict[tuple[str, int, int], tuple[float, float]] = {}
    for events in run.events:
        assert events[0].start == 0
        assert all(one.end == other.start for one, other in itertools.pairwise(events))
        for event in events:
            if event.computed:
                key = (event.computed.way, event.computed.row, event.computed.chunk)
                assert key not in done
                done[key] = event.start, event.end
    chunks = len(profile.forward)
    for (way, row, chunk), (start, _) in done.items():
        step = -1 if way == "forward" else 1
        source = (way, row, chunk + step)
        if source in done:
            elsewhere = rank_of_chunk(ranks, chunk) != rank_of_chunk(ranks, chunk + step)
            assert start >= done[source][1] + (profile.transfer if elsewhere else 0)
        else:
            assert chunk == (0 if way == "forward" else chunks - 1)
        assert way == "forward" or start >= done["forward", row, chunk][1]


@given(st.data())
def test_any_profile_obeys_time(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(SCHEDULES))
    ranks = data.draw(st.integers(2, 5))
    chunks = ranks if schedule == "1f1b" else 2 * ranks
    rows = data.draw(st.integers(1 if schedule == "1f1b" else 2 * ranks, 12))
    amounts = st.lists(st.integers(0, 9), min_size=chunks, max_size=chunks).map(tuple)
    profile = Profile(forward=data.draw(amounts), backward=data.draw(amounts), transfer=data.draw(st.integers(0, 3)))
    orders = orders_of(schedule, ranks, rows)
    run = simulate(orders, profile)
    check_time(run, ranks, profile)
    assert [[e.computed for e in events if e.computed] for events in run.events] == [list(passes(o)) for o in orders]


def test_ranks_that_wait_for_each_other_are_found() -> None:
    orders = orders_of("1f1b", 2, 1)
    orders[1] = tuple(group for group in orders[1] if str(group[0]) != "<F0.1")
    with pytest.raises(AssertionError, match=r"ranks wait for each other: rank 0 at F0.0>, rank 1 at B0.1>"):
        simulate(orders, even(2, 1, 1))
