"""The fast path: plain sums, gradients on their way while the backward pass goes on, weights while the next one begins.

Gradients are added in fp32 in the order of a rank's rows. Buckets, one per layer from the last to the first, then what
belongs to no layer, go to the owners as soon as their gradients are there: an all-to-all of what each owner needs, that
of experts in stochastically rounded bf16, then a sum in fp32 in the order of the ranks (R 3.4.1). A layout has the same
bits every time; another one has others.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.layers import at_least_fp32
from model.names import alias_of
from model.transformer import Transformer
from optim.groups import Span
from optim.rounding import generator_of, stochastic_bf16
from trainer.parallel.expert import StandBy, leaves
from trainer.parallel.owners import Arrival, Handout, Masters, Ownership
from trainer.parallel.world import Group
from trainer.precision.wire import Wire

CHUNK = 1 << 20
"""Numbers rounded at a time, at least, and less than twice as many: for each, rounding makes five copies."""
REST = "rest"
"""The bucket of what belongs to no layer: embedding, head, last norm and mixes."""
TIED = "tied"
"""The bucket of what first and last stage both use: their sums are added before it may leave."""


def bucket_of(parameter: str) -> str:
    """The layer of a parameter, layers.N or mtp.N, else REST."""
    match = re.match(r"(layers|mtp)\.\d+(?=\.)", parameter)
    return match[0] if match else REST


def buckets(parameters: Collection[str], tied: Collection[str] = ()) -> list[str]:
    """All buckets in the order in which a backward pass fills them: the same on every rank."""
    found = {bucket_of(parameter) for parameter in parameters} - {REST}
    order = sorted(found, key=lambda name: (name.startswith("mtp"), int(name.rpartition(".")[2])), reverse=True)
    return [*order, REST, *([TIED] if tied else [])]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Underway:
    """Gradients that are coming in: of `spans`, one after the other, from each rank of the group."""

    work: Any
    came: Tensor
    spans: Sequence[Span]
    shares: int
    dense: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Dtypes:
    """What sums are held in, and what dense gradients and those of experts travel in."""

    sums: torch.dtype
    dense: torch.dtype
    experts: torch.dtype


class FastSum:
    """Sums of a rank's leaves by name, and their way to the owners."""

    def __init__(
        self, shapes: Mapping[str, torch.Size], ownership: Ownership, *, dtypes: Dtypes, seed: int, device: torch.device
    ) -> None:
        self._sums = {name: torch.zeros(shape, dtype=dtypes.sums, device=device) for name, shape in shapes.items()}
        self._ownership, self._dtypes, self._seed, self._device = ownership, dtypes, seed, device
        self._order = buckets(shapes, ownership.tied)
        self._shares = [(share, self._by_bucket(share.spans)) for share in ownership.shares]
        self._active: frozenset[str] = frozenset()
        self._missing: dict[str, int] = {}
        self._launched: dict[str, list[_Underway]] = {}
        self._step, self._is_last = 0, False
        self._watched: Transformer | None = None

    def totals(self) -> Mapping[str, Tensor]:
        """The sums of this rank's rows by name."""
        return self._sums

    def watch(self, model: Transformer) -> None:
        """Take the model's gradients as they appear, from now on."""
        self._watched = model
        for name, leaf, _ in leaves(model):
            leaf.register_post_accumulate_grad_hook(self._taker(alias_of(name) or name))

    def begin(self, step: int, active: Collection[str]) -> None:
        """Start the sums of a step. active: the parameters that it trains."""
        self._step, self._active = step, frozenset(active)
        self._missing, self._launched = {}, {}
        for name in active:
            if name in self._sums:  # else it is another stage's
                self._sums[name].zero_()

    def begin_row(self, *, last: bool) -> None:
        """A row's passes follow; last: none after them on this rank, so that what is complete may leave."""
        self._is_last = last
        if last and self._watched is not None:
            for name, leaf, _ in leaves(self._watched):
                if leaf.requires_grad:
                    bucket = self._bucket_of(alias_of(name) or name)
                    self._missing[bucket] = self._missing.get(bucket, 0) + 1

    def add(self, name: str, leaf: Tensor) -> None:
        """Add a leaf to the sum of its name."""
        self._sums[name].add_(leaf)

    def finish(self) -> dict[str, Tensor]:
        """The gradients of the own spans by key, of all ranks' rows; every rank calls it after its last row."""
        self._ownership.sum_between_ends({name: total for name, total in self._sums.items() if name in self._active})
        self._launch(self._order)
        gradients: dict[str, Tensor] = {}
        for underway in (one for bucket in self._order for one in self._launched[bucket]):
            gradients |= self._receive(underway)
        own = {self._ownership.key(span): span for span in self._ownership.spans}
        return gradients | {key: self._alone(span) for key, span in own.items() if key not in gradients}

    def _alone(self, span: Span) -> Tensor:
        """The gradient of a span that no other rank of its group has leaves of."""
        rows = self._ownership.rows(span, self._sums[span.parameter])
        if span.parameter not in self._active or self._ownership.is_expert(span.parameter):
            return rows
        return self._ownership.sum_between_owners(rows.reshape(-1)).view(rows.shape)

    def _bucket_of(self, parameter: str) -> str:
        return TIED if parameter in self._ownership.tied else bucket_of(parameter)

    def _by_bucket(self, spans: Iterable[Span]) -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = {}
        for span in spans:
            found.setdefault(self._bucket_of(span.parameter), []).append(span)
        return found

    def _taker(self, name: str) -> Callable[[Tensor], None]:
        def take(leaf: Tensor) -> None:
            assert leaf.grad is not None, "the hook comes after the gradient"
            self.add(name, leaf.grad)
            leaf.grad = None
            if self._is_last:
                self._missing[self._bucket_of(name)] -= 1
                self._launch(self._complete())

        return take

    def _complete(self) -> Iterator[str]:
        """The buckets that may leave: in the one order that all ranks keep to."""
        for bucket in self._order:
            if bucket == TIED or self._missing.get(bucket, 1):
                return
            yield bucket

    def _launch(self, ready: Collection[str] | Iterator[str]) -> None:
        for bucket in ready:
            if bucket not in self._launched:
                self._launched[bucket] = list(self._send(bucket))

    def _send(self, bucket: str) -> Iterator[_Underway]:
        """An all-to-all for the dense parameters of a bucket, and one for its experts."""
        for dense in (True, False):
            shares = [(share, of.get(bucket, ())) for share, of in self._shares if share.dense == dense]
            if shares and shares[0][0].group.size > 1:
                of_owner = [[span for span in spans if span.parameter in self._active] for _, spans in shares]
                yield from self._exchange(bucket, shares[0][0].group, of_owner, dense)

    def _exchange(
        self, bucket: str, group: Group, of_owner: Sequence[Sequence[Span]], dense: bool
    ) -> Iterator[_Underway]:
        flat = [[self._rows(span) for span in spans] for spans in of_owner]
        sizes = [sum(len(rows) for rows in one) for one in flat]
        if not any(sizes):
            return
        mine = group.index
        going = self._packed([rows for one in flat for rows in one], bucket, dense)
        came = going.new_empty(sizes[mine] * group.size)
        work = dist.all_to_all_single(came, going, [sizes[mine]] * group.size, sizes, group=group.handle, async_op=True)
        yield _Underway(work=work, came=came, spans=of_owner[mine], shares=group.size, dense=dense)

    def _rows(self, span: Span) -> Tensor:
        return self._ownership.rows(span, self._sums[span.parameter]).reshape(-1)

    def _packed(self, parts: Sequence[Tensor], bucket: str, dense: bool) -> Tensor:
        """Flat parts one after the other, in what they travel in; rounded by the CHUNK, so that few copies exist."""
        if (self._dtypes.dense if dense else self._dtypes.experts) != torch.bfloat16:
            return torch.cat(list(parts))
        generator = generator_of(self._seed, self._step, bucket, dense, self._ownership.rank, device=self._device)
        going_P = torch.empty(sum(map(len, parts)), dtype=torch.bfloat16, device=self._device)
        done = 0
        for some in _batches(parts):
            x_P = torch.cat(some)
            going_P[done : done + len(x_P)] = stochastic_bf16(x_P, generator)
            done += len(x_P)
        return going_P

    def _receive(self, underway: _Underway) -> dict[str, Tensor]:
        underway.work.wait()
        first_P, *others = underway.came.chunk(underway.shares)
        total_P = at_least_fp32(first_P).clone()
        for other_P in others:
            total_P += other_P  # in total's type: bf16 is promoted number by number
        if underway.dense:
            total_P = self._ownership.sum_between_owners(total_P)
        shapes = [self._ownership.rows(span, self._sums[span.parameter]).shape for span in underway.spans]
        parts = total_P.split([shape.numel() for shape in shapes])
        keys = map(self._ownership.key, underway.spans)
        return {key: part.view(shape) for key, part, shape in zip(keys, parts, shapes, strict=True)}


def _batches(parts: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Flat tensors in their order, cut, so that each batch has some CHUNK numbers."""
    batch: list[Tensor] = []
    for piece in (piece for part in parts for piece in part.split(CHUNK)):
        batch.append(piece)
        if sum(map(len, batch)) >= CHUNK:
            yield batch
            batch = []
    if batch:
        yield batch


class EarlyHandout(Handout):
    """New weights on their way from their owners, while the next forward pass begins: a layer waits for its own."""

    def __init__(self, ownership: Ownership, wire: Wire, masters: Masters, model: Transformer) -> None:
        super().__init__(ownership, wire, masters)
        self._underway: dict[str, list[Arrival]] = {}
        model.register_forward_pre_hook(lambda module, given: self._settle_first())
        for number, block in model.layers.named_children():
            block.register_forward_pre_hook(lambda module, given, name=f"layers.{number}": self._settle(name))
        for module in model.modules():
            if isinstance(module, StandBy):
                module.register_forward_pre_hook(lambda module, given: self.settle())

    def begin(self, parameters: Mapping[str, Tensor], changed: Collection[str]) -> None:
        """Send and receive the new weights of `changed`; returns at once."""
        self.settle()
        for parameter, arrival in self._publish(parameters, changed):
            self._underway.setdefault(bucket_of(parameter), []).append(arrival)

    def settle(self) -> None:
        """Return when all weights are there."""
        for bucket in list(self._underway):
            self._settle(bucket)

    def _settle_first(self) -> None:
        """What belongs to no layer, and the MTP block, whose parts are called one by one."""
        for bucket in [name for name in self._underway if not name.startswith("layers.")]:
            self._settle(bucket)

    def _settle(self, bucket: str) -> None:
        for arrival in self._underway.pop(bucket, ()):
            arrival.settle()
