"""Silent corruption: what no computation wrote must not change, and replicas must be the same bits.

A look after a step takes the checksums of all that a rank holds: parameters, buffers, optimizer state. It compares
those that other ranks hold too (weights on all data ranks, experts on the ranks with the same ones, the state of owners
of the same), and fp32 masters with the weights that were rounded from them. Then it keeps them, and they are taken
again when the next step has computed its rows and is about to use the gradients, and before a save: whatever differs
has changed while it rested. So what has no replica is watched too, on one process everything; and a weight is, although
the next update would overwrite the flipped copy, or hand it to all ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model import names
from trainer.laps import Laps
from trainer.parallel.checksum import Checksum, words
from trainer.parallel.world import Group
from trainer.step import Parts


class Corrupted(RuntimeError):
    """Memory or a transfer gave other bits than were written; raised on all ranks alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One rank's part of a contradiction about one of its tensors: the checksum found, and the one that was expected.

    ranks: of the replicas, of whom none knows which is right; expected, because: of what this rank knows by itself.
    """

    tensor: str
    found: int
    ranks: tuple[int, ...] = ()
    expected: int = 0
    because: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """The checksums after `step` steps, by name."""

    step: int
    checksums: dict[str, int]


class Guard:
    """Looks at one rank's tensors; all ranks call its methods at the same steps. every_steps: 0 never looks."""

    def __init__(self, parts: Parts, every_steps: int) -> None:
        self._parts, self._every = parts, every_steps
        self._checksum = Checksum()
        self._tensors = dict(_weights(parts)) | dict(_state(parts))
        self._replicas = _replicas(parts, self._tensors)
        self._masters = list(_masters(parts))
        self._note: Note | None = None
        self._seconds = 0.0

    def begin(self, done: int) -> None:
        """At the beginning of a session: its ranks have read, or drawn, the same."""
        if self._every:
            self._look(done)

    def after_step(self, done: int, *, saves: bool) -> None:
        """After every step: a look at every so many, and where a save will follow."""
        self._note = None
        if self._every and (saves or done % self._every == 0):
            with self._timed():
                self._look(done)

    def before_update(self) -> None:
        """When a step's rows are computed: what was noted after the step before must still be there."""
        if self._note is not None:
            with self._timed():
                self._verify(self._note, self._note.step + 1)

    def before_save(self, done: int) -> None:
        """What has changed since it was computed must not go into a checkpoint."""
        if self._note is not None:
            self._verify(self._note, done)
        elif self._every:
            self._look(done)

    def seconds(self) -> float:
        """Seconds inside steps since this was called last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        laps = Laps(self._parts.device)
        yield
        laps.mark()
        self._seconds += sum(laps.seconds())

    def _look(self, done: int) -> None:
        self._parts.handout.settle()
        note = Note(step=done, checksums=self._take())
        _refuse(self._parts, done, [*self._unlike_masters(), *self._unlike_others(note.checksums)])
        self._note = note

    def _verify(self, note: Note, step: int) -> None:
        """Other ranks are spoken to in `control` only: gradients may be under way in the other groups."""
        now, because = self._take(), f"as after step {note.step}; nothing has written to it since"
        findings = [
            Finding(tensor=name, found=now[name], expected=noted, because=because)
            for name, noted in note.checksums.items()
            if now[name] != noted
        ]
        _refuse(self._parts, step, findings)

    def _take(self) -> dict[str, int]:
        return self._checksum.of_all(self._tensors, self._parts.pool.plain_map)

    def _unlike_masters(self) -> Iterator[Finding]:
        """Weights that are not their masters rounded."""
        differ = [
            (words(weight) != words(self._of_master(name, master, weight))).any()
            for name, weight, master in self._masters
        ]
        for at in torch.stack(differ).nonzero().flatten().tolist() if differ else []:
            name, weight, master = self._masters[at]
            found, expected = int(self._checksum(weight)), int(self._checksum(self._of_master(name, master, weight)))
            yield Finding(tensor=f"model/{name}", found=found, expected=expected, because="its master rounded")

    def _of_master(self, name: str, master: Tensor, weight: Tensor) -> Tensor:
        return self._parts.precision.weights.of_master(name, master).to(weight.dtype)

    def _unlike_others(self, checksums: Mapping[str, int]) -> Iterator[Finding]:
        """Tensors whose replicas are not all the same; every rank of their group finds them."""
        for group, tensors in self._replicas:
            mine_P = torch.tensor([checksums[name] for name in tensors], dtype=torch.int64)
            # The least, and the bits of the largest turned round.
            bounds_P = torch.cat([mine_P, ~mine_P])
            dist.all_reduce(bounds_P, op=dist.ReduceOp.MIN, group=group.handle)
            least_P, most_P = bounds_P.chunk(2)
            for at in (least_P != ~most_P).nonzero().flatten().tolist():
                yield Finding(tensor=tensors[at], found=int(mine_P[at]), ranks=group.ranks)


def _refuse(parts: Parts, step: int, findings: Sequence[Finding]) -> None:
    """Raise Corrupted on all ranks if any of them has found something."""
    if parts.world.agree(bool(findings)):
        raise Corrupted(describe(step, parts.world.gather(findings)))


def describe(step: int, of_ranks: Sequence[Sequence[Finding]]) -> str:
    """One line about the first tensor: what one rank knows by itself names it; else the majority of the replicas."""
    certain = [(one.tensor, rank, one) for rank, found in enumerate(of_ranks) for one in found if one.because]
    shared = sorted({(one.tensor, one.ranks) for found in of_ranks for one in found if not one.because})
    others = len({one.tensor.partition("[")[0] for found in of_ranks for one in found}) - 1
    more = f" (and {others} more like it)" if others else ""
    if certain:
        tensor, rank, one = min(certain, key=lambda found: found[:2])
        expected = f"{_hex(one.expected)}, {one.because}"
        return f"step {step}: {tensor} on rank {rank} = checksum {_hex(one.found)}: expected {expected}{more}"
    tensor, ranks = shared[0]
    sums = {rank: one.found for rank in ranks for one in of_ranks[rank] if (one.tensor, one.ranks) == shared[0]}
    return f"step {step}: {tensor} on {_outvoted(sums)}{more}"


def _outvoted(sums: Mapping[int, int]) -> str:
    """The ranks whose checksum is not the majority's; all of them where there is none."""
    for candidate in set(sums.values()):
        others = [rank for rank, found in sums.items() if found != candidate]
        if 2 * len(others) < len(sums):
            agreed = f"{_hex(candidate)}, as on the other {len(sums) - len(others)} ranks"
            return f"{_listed({rank: sums[rank] for rank in others})}: expected {agreed}"
    return f"{_listed(sums)}: expected the same bits"


def _listed(sums: Mapping[int, int]) -> str:
    plural = "s" * (len(sums) > 1)
    return f"rank{plural} {', '.join(map(str, sums))} = checksum{plural} {_hex(*sums.values())}"


def _hex(*checksums: int) -> str:
    return ", ".join(f"{checksum & (1 << 64) - 1:016x}" for checksum in checksums)


def _weights(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """What this rank has of the model, by name; rows where others hold the rest."""
    for name, tensor in names.tensors(parts.model).items():
        first, whole = parts.ownership.first_row(name), name not in parts.groups
        whole = whole or len(tensor) == parts.ownership.whole_shape(name)[0]
        yield f"model/{name}" if whole else f"model/{name}[{first}:{first + len(tensor)}]", tensor.detach()


def _state(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parts.optimizer.state_dict().items():
        yield f"optimizer/{name}", tensor


def _replicas(parts: Parts, tensors: Mapping[str, Tensor]) -> list[tuple[Group, list[str]]]:
    """The groups of ranks that have the same tensors, and the names of these, in one order on all of them."""
    found: dict[tuple[int, ...], tuple[Group, list[str]]] = {}
    for name in sorted(tensors):
        of_model = name.startswith("model/")
        parameter = name.split("/", 1 if of_model else 2)[-1].partition("[")[0]
        is_expert, world = parts.ownership.is_expert(parameter), parts.world
        groups = (world.replicas, None) if is_expert else (world.data, world.same_owners)
        ends = world.ends if of_model and parameter in parts.ownership.tied else None
        for group in (groups[0 if of_model else 1], ends):
            if group is not None and group.size > 1:
                found.setdefault(group.ranks, (group, []))[1].append(name)
    return list(found.values())


def _masters(parts: Parts) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and master of each owned logical tensor that has a master of its own."""
    for member, weight, master in parts.optimizer.masters():
        yield member.parameter, weight, master
