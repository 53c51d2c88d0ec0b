"""Proves that the orders of a pipeline are those that DeepSpeed's schedules issue, transfers included."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from deepspeed.runtime.pipe import schedule as theirs

from trainer.parallel.orders import (
    Act,
    Action,
    Group,
    Order,
    Schedule,
    Way,
    chunks_of_rank,
    forward_order,
    passes,
    rank_of_chunk,
    text,
    training_order,
)

ONE_F_ONE_B = [(ranks, rows) for ranks in (1, 2, 3, 4, 5, 8, 16) for rows in (1, 2, 3, 4, 7, 8, 16, 33)]
DUALPIPEV = [(ranks, rows) for ranks in (2, 3, 4, 5, 8, 16) for rows in (2 * ranks, 2 * ranks + 1, 3 * ranks + 2, 64)]
LAYOUTS: tuple[tuple[Schedule, list[tuple[int, int]]], ...] = (("1f1b", ONE_F_ONE_B), ("dualpipev", DUALPIPEV))
CASES = [(schedule, ranks, rows) for schedule, sizes in LAYOUTS for ranks, rows in sizes]
KINDS: dict[type, tuple[Act, Way]] = {
    theirs.ForwardPass: ("pass", "forward"),
    theirs.BackwardPass: ("pass", "backward"),
    theirs.SendActivation: ("send", "forward"),
    theirs.RecvActivation: ("receive", "forward"),
    theirs.SendGrad: ("send", "backward"),
    theirs.RecvGrad: ("receive", "backward"),
}


def issued(steps: theirs.PipeSchedule, ranks: int, rank: int, *, queued: bool) -> Iterator[Group]:
    """DeepSpeed's instructions as groups of actions. queued: transfers wait for the next CommitP2P.

    An instruction names a buffer. Each kind of instruction takes rows in order, chunk by chunk, so that the how-manieth
    of its kind it is gives the row; DualPipeV's buffers name the row, too, which is compared.
    """
    seen, waiting = Counter[tuple[type, int]](), list[Action]()
    for instruction in (one for step in steps for one in step):
        kind = type(instruction)
        if kind is theirs.CommitP2P and waiting:
            yield tuple(waiting)
            waiting = []
        if kind not in KINDS:
            continue
        phase = instruction.kwargs.get("phase", 0)
        row = seen[kind, phase]
        seen[kind, phase] += 1
        if queued:
            assert instruction.kwargs["buffer_id"] == phase * steps.num_micro_batches + row
        act, way = KINDS[kind]
        action = Action(act=act, way=way, row=row, chunk=2 * ranks - 1 - rank if phase else rank)
        if queued and act != "pass":
            waiting.append(action)
        else:
            yield (action,)
    assert not waiting


@pytest.mark.parametrize(("ranks", "rows"), ONE_F_ONE_B)
def test_1f1b_is_deepspeeds(ranks: int, rows: int) -> None:
    for rank in range(ranks):
        steps = theirs.TrainSchedule(rows, ranks, rank)
        assert training_order("1f1b", ranks, rank, rows) == tuple(issued(steps, ranks, rank, queued=False))


@pytest.mark.parametrize(("ranks", "rows"), ONE_F_ONE_B)
def test_forward_alone_is_deepspeeds(ranks: int, rows: int) -> None:
    for rank in range(ranks):
        steps = theirs.InferenceSchedule(rows, ranks, rank)
        assert forward_order("1f1b", ranks, rank, rows) == tuple(issued(steps, ranks, rank, queued=False))


@pytest.mark.parametrize(("ranks", "rows"), DUALPIPEV)
def test_dualpipev_is_deepspeeds(ranks: int, rows: int) -> None:
    for rank in range(ranks):
        steps = theirs.DualPipeVSchedule(rows, ranks, rank)
        assert training_order("dualpipev", ranks, rank, rows) == tuple(issued(steps, ranks, rank, queued=True))
        steps = theirs.DualPipeVSchedule(rows, ranks, rank, forward_only=True)
        assert forward_order("dualpipev", ranks, rank, rows) == tuple(issued(steps, ranks, rank, queued=True))


@pytest.mark.parametrize(("schedule", "ranks", "rows"), CASES)
def test_every_row_goes_through_every_chunk_once_each_way(schedule: Schedule, ranks: int, rows: int) -> None:
    """And every transfer has a partner on the neighbour's rank, in the same order."""
    moved: dict[str, list[tuple[str, int, int]]] = {"send": [], "receive": []}
    chunks = ranks if schedule == "1f1b" else 2 * ranks
    for rank in range(ranks):
        order, own = training_order(schedule, ranks, rank, rows), chunks_of_rank(schedule, ranks, rank)
        assert all(rank_of_chunk(ranks, chunk) == rank for chunk in own)
        done = [(one.way, one.row, one.chunk) for one in passes(order)]
        wanted = [(way, row, chunk) for way in ("forward", "backward") for row in range(rows) for chunk in own]
        assert sorted(done) == sorted(wanted)
        for row in range(rows):
            for chunk in own:
                assert done.index(("forward", row, chunk)) < done.index(("backward", row, chunk))
        for one in (one for group in order for one in group if one.act != "pass"):
            step = 0 if one.act == "receive" else 1 if one.way == "forward" else -1
            moved[one.act].append((one.way, one.row, one.chunk + step))
    assert sorted(moved["send"]) == sorted(moved["receive"])
    borders = (chunks - 1) if schedule == "1f1b" else 2 * (ranks - 1)
    assert len(moved["send"]) == 2 * rows * borders


def test_what_is_printed_reads_as_it_happens() -> None:
    orders = [training_order("1f1b", 2, rank, 2) for rank in range(2)]
    assert text(orders).splitlines() == [
        "rank 0: F0.0 F0.0> F1.0 <B0.0 F1.0> B0.0 <B1.0 B1.0",
        "rank 1: <F0.1 F0.1 B0.1 B0.1> <F1.1 F1.1 B1.1 B1.1>",
    ]
    (line,) = text([forward_order("dualpipev", 2, 0, 4)]).splitlines()
    assert line.endswith("F3.0 [F3.0> <F2.3] F2.3 <F3.3 F3.3")


@pytest.mark.parametrize("make", [training_order, forward_order])
def test_too_few_rows_are_refused(make: Callable[[Schedule, int, int, int], Order]) -> None:
    with pytest.raises(ValueError, match=r"rows = 7: expected at least 8, twice the 4 ranks of DualPipeV"):
        make("dualpipev", 4, 0, 7)


def test_one_rank_takes_turns() -> None:
    order = training_order("1f1b", 1, 0, 3)
    assert [str(one) for one in passes(order)] == ["F0.0", "B0.0", "F1.0", "B1.0", "F2.0", "B2.0"]
