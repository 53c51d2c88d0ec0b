"""What the ranks of a mesh send each other in a step, collective by collective, from the configuration alone.

Counted are the tensors of tokens, gradients and weights. Denominators, losses, loads and norms, a few numbers of each
row and layer, are not. All figures are of all ranks together. Held by tests/dist/test_plan_traffic.py to what small
meshes send.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from model.config import AttentionMode
from optim import zero
from optim.groups import Member
from trainer.config import TrainConfig
from trainer.parallel.stages import Part
from trainer.plan_memory import DTYPE_BYTES, FP32_BYTES, FP64_BYTES, INT64_BYTES, Tensors, is_trained
from trainer.plan_rows import rows_of_column, stream_bytes
from trainer.precision.elements import coded_bytes
from trainer.precision.recipe import Formats, Recipe
from trainer.schedule import StepPlan, after

SENT = {"all_to_all": 1, "reduce": 1, "broadcast": 1, "all_reduce": 2}
"""How often a rank passes on what it gives to a group of n, times (n - 1) / n: pairwise or by a ring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """One kind of exchange in a step. kind: as torch.distributed calls it. axis, group: whose ranks, how many a call.

    calls, payload_bytes (of the tensors that ranks give) and sent_bytes (what leaves a rank for others): of all ranks.
    """

    name: str
    kind: str
    axis: str
    group: int
    calls: int
    payload_bytes: int
    sent_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Of a pipe rank: what it holds, and its members by owner.

    dense: of its dense matrices. experts: of the experts that one rank of it holds, over its replicas.
    """

    part: Part
    model: Tensors
    dense: tuple[tuple[Member, ...], ...]
    experts: tuple[tuple[Member, ...], ...]


def traffic(config: TrainConfig, step: StepPlan, pipe: Sequence[Shares]) -> tuple[Collective, ...]:
    """The exchanges of one step, in order; those of groups of one rank are none. Expert loads count as even.

    pipe: of all pipe ranks.
    """
    trained = [_trained(shares, step.attention) for shares in pipe]
    found = [*_tokens(config, step), *_streams(config, step), *_between_ends(config, trained)]
    found += _added([list(_gradients(config, shares)) for shares in trained])
    recipe = Recipe(config.precision, config.model)
    found += _added([list(_weights(config, shares, recipe.at(after(step)))) for shares in trained])
    return tuple(one for one in found if one.group > 1 and one.calls)


def _trained(shares: Shares, mode: AttentionMode) -> Shares:
    dense, experts = (
        tuple(tuple(one for one in own if is_trained(one.group, mode)) for own in of)
        for of in (shares.dense, shares.experts)
    )
    return replace(shares, dense=dense, experts=experts)


def _added(pipe: Sequence[Sequence[Collective]]) -> list[Collective]:
    """The same exchanges of all pipe ranks as one."""
    return [
        replace(
            alike[0],
            calls=sum(one.calls for one in alike),
            payload_bytes=sum(one.payload_bytes for one in alike),
            sent_bytes=sum(one.sent_bytes for one in alike),
        )
        for alike in zip(*pipe, strict=True)
    ]


def _streams(config: TrainConfig, step: StepPlan) -> Iterator[Collective]:
    """Over each border between chunks that lie on different ranks: there, and the gradients back.

    A column whose last round has no row sends as much where experts wait for it, else nothing.
    """
    parallel = config.parallel
    borders = parallel.chunks - (2 if parallel.chunks > parallel.pipe else 1)
    rows = rows_of_column(config, step) * parallel.data if parallel.expert > 1 else step.rows
    sent = rows * borders * stream_bytes(config, step.row_length)
    for name in ("streams", "gradients of streams"):
        yield Collective(
            name=name,
            kind="send",
            axis="pipe",
            group=parallel.pipe,
            calls=rows * borders,
            payload_bytes=sent,
            sent_bytes=sent,
        )


def _between_ends(config: TrainConfig, pipe: Sequence[Shares]) -> Iterator[Collective]:
    """The gradient of the embedding, where first and last pipe rank use it: each adds the other's."""
    tied = [shares for shares in pipe if shares.part.is_tied]
    if "embed.weight" not in (one.parameter for shares in tied for own in shares.dense for one in own):
        return
    numbers, ranks = math.prod(tied[0].model.shapes["embed.weight"]), len(tied) * config.parallel.data
    if config.parallel.reduction == "exact":
        payload = ranks * numbers * INT64_BYTES
        yield _collective("embedding between ends", "all_reduce", "ends", len(tied), ranks, payload)
    else:
        width = FP64_BYTES if config.precision.dtype == "fp64" else FP32_BYTES
        yield _gather("embedding between ends", "ends", len(tied), ranks, ranks * numbers * width)


def _tokens(config: TrainConfig, step: StepPlan) -> Iterator[Collective]:
    """Token-expert pairs there, results back, and the way of their gradients; again where they are computed again."""
    model, width, mesh = config.model, DTYPE_BYTES[config.precision.dtype], config.parallel.mesh
    again = {"experts", "block"} & set(config.recompute), {"experts"} & set(config.recompute)
    trains = step.attention != "indexer_warmup"
    branches = model.num_nextn_predict_layers
    tokens = model.num_hidden_layers * step.row_length, branches * (step.row_length - 1)
    times = tuple(1 + bool(parts and trains) for parts in again)
    forward = sum(number * count for number, count in zip(tokens, times, strict=True))
    layers = model.num_hidden_layers * times[0] + branches * times[1]
    back = model.hidden_size * width
    pair = 2 * back + max(width, FP32_BYTES)
    there = _token_bytes(config, step) + back + max(width, FP32_BYTES)
    rounds = -(-step.rows // mesh.data) * mesh.data
    pairs = step.rows * model.num_experts_per_tok
    counts = rounds * layers * model.n_routed_experts * INT64_BYTES
    yield _collective("counts of tokens", "all_to_all", "expert", mesh.expert, rounds * layers, counts)
    yield _collective(
        "tokens to experts and back", "all_to_all", "expert", mesh.expert, 3 * rounds * layers, pairs * forward * there
    )
    if trains:
        calls = 3 * rounds * (model.num_hidden_layers + branches)
        yield _collective("their gradients", "all_to_all", "expert", mesh.expert, calls, pairs * sum(tokens) * pair)


def _token_bytes(config: TrainConfig, step: StepPlan) -> int:
    """Of a token on its way to an expert: as codes where its experts round it anyway."""
    width = config.model.hidden_size
    table = Recipe(config.precision, config.model).at(step.tokens)
    taken = next((formats.input for name, formats in table.items() if name.endswith("ffn.experts.w1")), None)
    return width * DTYPE_BYTES[config.precision.dtype] if taken is None else coded_bytes((1, width), taken)


def _gradients(config: TrainConfig, trained: Shares) -> Iterator[Collective]:
    """Of one pipe rank's: to the owners, on the exact path as integers, and between ranks that own the same."""
    model = trained.model
    mesh, exact = config.parallel.mesh, config.parallel.reduction == "exact"
    replicas, turns = mesh.data // mesh.expert, mesh.data // mesh.owners
    dense, experts = (sum(_elements(model, own) for own in of) for of in (trained.dense, trained.experts))
    spans, of_experts = (sum(len(zero.spans(own)) for own in of) for of in (trained.dense, trained.experts))
    own_dense, ranks = dense * turns, mesh.size // mesh.pipe
    if exact:
        bounds = ranks * 2 * len(model.shapes) * FP64_BYTES
        yield _gather("bounds of sums", "data", mesh.data, ranks, bounds)
        yield _collective(
            "dense gradients", "reduce", "owners", mesh.owners, ranks * spans, ranks * dense * INT64_BYTES
        )
        yield _collective(
            "experts' gradients", "reduce", "replicas", replicas, ranks * of_experts, ranks * experts * INT64_BYTES
        )
        yield _collective("between owners", "all_reduce", "same_owners", turns, turns * spans, own_dense * INT64_BYTES)
        return
    fp64 = config.precision.dtype == "fp64"
    width = FP64_BYTES if fp64 else DTYPE_BYTES[config.parallel.dense_reduction]
    of_expert = FP64_BYTES if fp64 else DTYPE_BYTES["bf16"]
    parts, of_layers = (
        len({_bucket(one.parameter, trained.part) for own in of for one in own})
        for of in (trained.dense, trained.experts)
    )
    yield _collective("dense gradients", "all_to_all", "owners", mesh.owners, ranks * parts, ranks * dense * width)
    yield _collective(
        "experts' gradients", "all_to_all", "replicas", replicas, ranks * of_layers, ranks * experts * of_expert
    )
    # There and back: each adds a part up and hands it out.
    calls, sums = 2 * ranks * (parts if mesh.owners > 1 else spans), FP64_BYTES if fp64 else FP32_BYTES
    yield _collective("between owners", "all_to_all", "same_owners", turns, calls, 2 * own_dense * sums)


def _weights(config: TrainConfig, trained: Shares, table: Mapping[str, Formats]) -> Iterator[Collective]:
    """New ones of one pipe rank's from their owners, in the model's type, or as codes of their formats."""
    model, ranks = trained.model, config.parallel.mesh.size // config.parallel.pipe
    mesh, width = config.parallel.mesh, DTYPE_BYTES[config.precision.dtype]
    for name, of, axis, group in (
        ("new dense weights", trained.dense, "owners", mesh.owners),
        ("new experts' weights", trained.experts, "replicas", mesh.data // mesh.expert),
    ):
        size = sum(_weight_bytes(model, member, width, table[member.parameter]) for own in of for member in own)
        spans = sum(len(zero.spans(own)) for own in of)
        yield _collective(name, "broadcast", axis, group, ranks * spans, ranks * size)


def _collective(name: str, kind: str, axis: str, group: int, calls: int, payload: int) -> Collective:
    sent = SENT[kind] * payload * (group - 1) // group
    return Collective(name=name, kind=kind, axis=axis, group=group, calls=calls, payload_bytes=payload, sent_bytes=sent)


def _gather(name: str, axis: str, group: int, calls: int, payload: int) -> Collective:
    """Everybody's goes to everybody."""
    sent = payload * (group - 1)
    return Collective(
        name=name, kind="all_gather", axis=axis, group=group, calls=calls, payload_bytes=payload, sent_bytes=sent
    )


def _bucket(parameter: str, part: Part) -> str:
    """What leaves together on the fast path, as `trainer.parallel.fast` has it."""
    if parameter == "embed.weight" and part.is_tied:
        return "tied"
    first, _, rest = parameter.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("layers", "mtp") else "rest"


def _elements(model: Tensors, members: Sequence[Member]) -> int:
    return sum(math.prod(zero.shape_of(member, model.shapes)) for member in members)


def _weight_bytes(model: Tensors, member: Member, width: int, formats: Formats) -> int:
    shape = zero.shape_of(member, model.shapes)
    if formats.weight:
        return coded_bytes(shape, formats.weight[0])
    return math.prod(shape) * (max(width, FP32_BYTES) if member.parameter in model.islands else width)
