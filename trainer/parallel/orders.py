"""The order of a pipeline's schedule as data: what each rank computes, sends and receives, in which order.

An order is a tuple of groups of actions. A pass is a group of its own. Transfers of one group begin together and all
end before the next group; 1F1B has one transfer a group, for its sends wait for their receiver.

1F1B (PipeDream-Flush) goes by a clock that all ranks share: rank r of P takes row i forward at tick 2 i + r and back at
tick 2 i + 2 P - 1 - r. What a pass has made leaves at the next tick, before or after what that tick's pass needs: ranks
that go forward send first, so that two neighbours never both wait.

DualPipeV (DeepSeek) is the table in `_stretches`. Chunks 0..P-1 lie on ranks 0..P-1, and chunks P..2P-1 come back on
ranks P-1..0, so that the last rank hands its own on and rank 0 has both ends.

Both are what DeepSpeed issues, action by action (tests/trainer/test_orders.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from model.config import require

Act = Literal["pass", "send", "receive"]
Way = Literal["forward", "backward"]
Schedule = Literal["1f1b", "dualpipev"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """What a rank does for a row and one of its chunks. receive: of what the chunk takes in. send: of its result.

    forward: streams, from the chunk before to the one behind. backward: their gradients, the other way.
    """

    act: Act
    way: Way
    row: int
    chunk: int

    def __str__(self) -> str:
        """F3.1: row 3 forward through chunk 1; B: backward; < before it: receives for it; > behind it: sends."""
        name = f"{self.way[0].upper()}{self.row}.{self.chunk}"
        return {"pass": name, "send": f"{name}>", "receive": f"<{name}"}[self.act]


Group = tuple[Action, ...]
Order = tuple[Group, ...]


def training_order(schedule: Schedule, ranks: int, rank: int, rows: int) -> Order:
    """Forward and backward of rows 0..rows-1 on one rank. Raises ValueError where a schedule needs more rows."""
    if schedule == "1f1b":
        return tuple(_one_forward_one_backward(ranks, rank, rows))
    _require_rows(ranks, rows)
    return tuple(_dualpipev(ranks, rank, rows, ("forward", "backward")))


def forward_order(schedule: Schedule, ranks: int, rank: int, rows: int) -> Order:
    """The same without a backward pass, for measuring. Raises ValueError where a schedule needs more rows."""
    if schedule == "1f1b":
        return tuple(_forward_ticks(ranks, rank, rows))
    _require_rows(ranks, rows)
    return tuple(_dualpipev(ranks, rank, rows, ("forward",)))


def passes(order: Order) -> tuple[Action, ...]:
    """What is computed."""
    return tuple(action for group in order for action in group if action.act == "pass")


def chunks_of_rank(schedule: Schedule, ranks: int, rank: int) -> tuple[int, ...]:
    """The numbers of the chunks that a rank has, the earlier first."""
    return (rank,) if schedule == "1f1b" else (rank, 2 * ranks - 1 - rank)


def rank_of_chunk(ranks: int, chunk: int) -> int:
    """The rank that has a chunk: those from `ranks` on lie on the way back."""
    return min(chunk, 2 * ranks - 1 - chunk)


def text(orders: Sequence[Order]) -> str:
    """The orders of all ranks, one a line; transfers that are waited for together in brackets."""
    lines = []
    for rank, order in enumerate(orders):
        groups = (" ".join(map(str, group)) for group in order)
        words = (f"[{word}]" if " " in word else word for word in groups)
        lines.append(f"rank {rank}: " + " ".join(words))
    return "\n".join(lines)


def _require_rows(ranks: int, rows: int) -> None:
    require(rows >= 2 * ranks, "rows", rows, f"at least {2 * ranks}, twice the {ranks} ranks of DualPipeV")


def _one_forward_one_backward(ranks: int, rank: int, rows: int) -> Iterator[Group]:
    made: Group = ()
    for tick in range(2 * (rows + ranks - 1)):
        forward = (tick - rank) % 2 == 0
        row = (tick - rank) // 2 if forward else (tick + rank + 1) // 2 - ranks
        now = (Action(act="pass", way="forward" if forward else "backward", row=row, chunk=rank),)
        now = now if 0 <= row < rows else ()
        sent, received = _moved("send", made, ranks, rank), _moved("receive", now, ranks, rank)
        yield from filter(None, (sent, received, now) if forward else (received, sent, now))
        made = now


def _forward_ticks(ranks: int, rank: int, rows: int) -> Iterator[Group]:
    """Row i passes rank r at tick i + r; even ranks send first."""
    made: Group = ()
    for tick in range(rows + ranks - 1):
        row = tick - rank
        now = (Action(act="pass", way="forward", row=row, chunk=rank),) if 0 <= row < rows else ()
        sent, received = _moved("send", made, ranks, rank), _moved("receive", now, ranks, rank)
        yield from filter(None, (received, sent, now) if rank % 2 else (sent, received, now))
        made = now


def _moved(act: Act, passed: Group, ranks: int, rank: int) -> Group:
    """What 1F1B sends or receives for a pass: nothing at the ends."""
    return tuple(
        Action(act=act, way=one.way, row=one.row, chunk=rank)
        for one in passed
        if 0 <= rank + _step(act, one.way) < ranks
    )


def _step(act: Act, way: Way) -> int:
    """From a chunk to the one that a transfer of it goes to or comes from."""
    return 1 if (act == "send") == (way == "forward") else -1


def _stretches(P: int, r: int, R: int) -> tuple[tuple[int, str], ...]:
    """DualPipeV on rank r of P with R rows: how often, and what.

    F0 and B0: forward and backward through the chunk on the way out, F1 and B1 on the way back, each of its next row.
    <F0: the next streams for it are to come, F0>: its next result is to go; <B0 and B0> likewise of gradients. |: what
    is to come and go by now does so at once. The last rank lets its last F1 before the main stretch go one pass later.
    """
    last = int(r == P - 1)
    return (
        (2 * (P - 1 - r), "<F0 | F0 F0>"),
        (1, "<F0"),
        (r + 1 - last, "| F0 <F0 <F1 | F1 F1> F0>"),
        (last, "| F0 <F0 <F1 | F1"),
        (P - 1 - r, "<B1 | B1 B1> <F1 | F1 F1>"),
        (last, "| F0 F1> <B1 | B1 B1> <F1 <B0 | F1 B0 F1> B0>"),
        (1 - last, "<B1 | F0 B1 F0> B1> <F1 <B0 | F1 B0 F1> B0>"),
        (R - 2 * P + r, "<F0 <B1 | F0 B1 F0> B1> <F1 <B0 | F1 B0 F1> B0>"),
        (P - 1 - r, "<B1 | B1 B1> <F1 <B0 | F1 B0 F1> B0>"),
        (r + 1, "<B1 | B1 B1> <B0 | B0 B0>"),
        (P - 1 - r, "| <B0 | B0 B0>"),
        (1, "|"),
    )


def _dualpipev(ranks: int, rank: int, rows: int, ways: Sequence[Way]) -> Iterator[Group]:
    chunks, seen = chunks_of_rank("dualpipev", ranks, rank), Counter[str]()
    waiting: list[Action] = []
    for word in (word for times, words in _stretches(ranks, rank, rows) for word in times * words.split()):
        if word == "|":
            yield from filter(None, (tuple(waiting),))
            waiting = []
            continue
        name = word.strip("<>")
        way: Way = "forward" if name[0] == "F" else "backward"
        if way not in ways:
            continue
        chunk = chunks[int(name[1])]
        act: Act = "receive" if word[0] == "<" else "send" if word[-1] == ">" else "pass"
        action = Action(act=act, way=way, row=seen[word], chunk=chunk)
        seen[word] += 1
        if act == "pass":
            yield (action,)
        elif _is_elsewhere(ranks, chunk, chunk + _step(act, way)):
            waiting.append(action)


def _is_elsewhere(ranks: int, chunk: int, other: int) -> bool:
    """True where a chunk's neighbour exists and another rank has it."""
    return 0 <= other < 2 * ranks and rank_of_chunk(ranks, other) != rank_of_chunk(ranks, chunk)
