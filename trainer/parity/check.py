"""The comparison itself, and the verdict in words: the layout beside one process, or beside itself where it must be."""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace

from trainer.config import ParallelConfig, TrainConfig
from trainer.device import settle
from trainer.parallel.placement import Placement
from trainer.parallel.world import ALONE, start
from trainer.parity.take import Digests, Outcome, take


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """A figure over all steps: in how many it is not the same to the bit, and by how much, in shares of the larger."""

    name: str
    steps: int
    different: int
    first: int | None
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """terms: by name. weights, state: logical tensors that differ, of how many. odd: of which replicas differ.

    alike: all is the same to the bit.
    """

    terms: tuple[Term, ...]
    weights: tuple[list[str], int]
    state: tuple[list[str], int]
    odd: list[str]

    @property
    def alike(self) -> bool:
        return not (any(term.different for term in self.terms) or self.weights[0] or self.state[0] or self.odd)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """against_one: the layout beside one process. again: beside itself, run a second time; None on the exact path.

    kept: what the layout promises is so.
    """

    against_one: Verdict
    again: Verdict | None
    parameters: int

    @property
    def kept(self) -> bool:
        return (self.again or self.against_one).alike


def check(config: TrainConfig, place: Placement) -> Parity:
    """Run a scaled configuration on one process, which is rank 0's, and on the layout's; all ranks call it."""
    device = settle(config, place.local_rank)
    single = replace(config, parallel=ParallelConfig(check_every_steps=0))
    alone = take(single, device, ALONE) if place.rank == 0 else None
    with closing(start(config.parallel.mesh, place, device)) as world:
        together = take(config, device, world)
        again = take(config, device, world) if config.parallel.reduction == "fast" else None
        alone = world.from_first(alone)
    return Parity(
        against_one=compare(alone, together),
        again=None if again is None else compare(again, together),
        parameters=alone.parameters,
    )


def compare(expected: Outcome, found: Outcome) -> Verdict:
    """Every figure of every step, every logical tensor."""
    names = dict.fromkeys(name for told in (*expected.figures, *found.figures) for name in told)
    return Verdict(
        terms=tuple(_term(name, expected.figures, found.figures) for name in names),
        weights=(_different(expected.weights, found.weights), len(expected.weights)),
        state=(_different(expected.state, found.state), len(expected.state)),
        odd=found.odd,
    )


def _term(name: str, expected: Sequence[dict[str, float]], found: Sequence[dict[str, float]]) -> Term:
    pairs = [(one.get(name), other.get(name)) for one, other in zip(expected, found, strict=True)]
    told = [(step, one, other) for step, (one, other) in enumerate(pairs, 1) if (one, other) != (None, None)]
    different = [(step, one, other) for step, one, other in told if not _same(one, other)]
    gaps = [_gap(one, other) for _, one, other in different]
    first = different[0][0] if different else None
    return Term(name=name, steps=len(told), different=len(different), first=first, largest=max(gaps, default=0.0))


def _same(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isnan(one) and math.isnan(other))


def _gap(one: float | None, other: float | None) -> float:
    """The difference in shares of the larger; infinite where one is missing or no number."""
    if one is None or other is None or not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def _different(expected: Digests, found: Digests) -> list[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def as_json(parity: Parity) -> dict[str, object]:
    """The whole comparison as plain values."""
    return {**asdict(parity), "kept": parity.kept}


def lines(config: TrainConfig, parity: Parity) -> Iterator[str]:
    """The comparison for people, verdict last."""
    model, parallel = config.model, config.parallel
    yield (
        f"parity of {config.name}, scaled down to {model.num_hidden_layers} layers, {model.n_routed_experts} experts, "
        f"{parity.parameters:,} parameters"
    )
    stages = f"pipe {parallel.pipe} by {parallel.schedule}, " if parallel.pipe > 1 else ""
    steps = max(term.steps for term in parity.against_one.terms)
    yield (
        f"{steps} steps on {parallel.mesh.size} processes ({stages}data {parallel.data}, expert {parallel.expert}), "
        f"{parallel.reduction} sums, {config.precision.dtype}, and on one"
    )
    yield ""
    yield from _table(parity.against_one)
    if parity.again is not None:
        yield from ("", "the same layout a second time")
        yield from _table(parity.again)
    yield ""
    yield f"verdict: {_verdict(parity)}"


def _table(verdict: Verdict) -> Iterator[str]:
    width = max(len(term.name) for term in verdict.terms)
    yield f"{'':<{width}}   steps   other bits   largest difference"
    for term in verdict.terms:
        size = "" if not term.different else f"{term.largest:.1e}, first in step {term.first}"
        yield f"{term.name:<{width}}   {term.steps:>5}   {term.different or '-':>10}   {size}".rstrip()
    for what, (different, of) in (("weights", verdict.weights), ("optimizer state", verdict.state)):
        some = f"   {', '.join(different[:2])}{', ...' if len(different) > 2 else ''}" if different else ""
        yield f"{what:<{width}}   {of:>5}   {len(different) or '-':>10}{some}"
    if verdict.odd:
        yield f"replicas with other bits: {', '.join(verdict.odd[:3])}{', ...' if len(verdict.odd) > 3 else ''}"


def _verdict(parity: Parity) -> str:
    if parity.again is None:
        return "the same bits as one process" if parity.kept else "NOT the same bits as one process"
    if not parity.kept:
        return "NOT the same bits every time"
    losses = [term.largest for term in parity.against_one.terms if term.name in ("loss/lm", "loss/mtp")]
    return f"the same bits every time; losses within {max(losses):.1e} of one process (the fast path promises no more)"
