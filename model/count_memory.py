"""Bytes that one row's forward pass keeps for its backward pass, by part, from the configuration alone.

Counted as the plain functions keep them, to the byte but for a few numbers per layer. Products with gradients to both
factors keep both; norms, mHC, attention and SwiGLU what their hand-written backward passes ask for. In a model of lower
precision than fp32 an island keeps a promoted copy of its input. Held by tests/model/test_count_memory.py.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

from model.config import AttentionMode, ModelConfig
from model.count_kept import (
    INDEX_BYTES,
    MASK_BYTES,
    Inputs,
    Row,
    attention,
    attention_indices,
    attention_takes,
    copied,
    end,
    experts,
    experts_indices,
    experts_take,
    indices,
    inner,
    logits,
    loss,
    places,
    taken,
    upward,
    warmup,
    widths,
)

PLAIN = Inputs()
PARTS = (
    "places", "streams", "attention", "compressor", "indexer", "router", "experts", "shared_experts", "loss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a row's backward pass. kept: bytes that it lets go of, by part. again: bytes computed again for it.

    working: bytes that it makes where it makes most. trains: prefixes of the parameters whose gradients it leaves.
    first, last: what there is more while the first, and the last, of several rows passes the experts, gradients apart.
    """

    trains: tuple[str, ...]
    kept: Counter[str]
    again: int = 0
    working: int = 0
    first: int = 0
    last: int = 0


def kept_bytes(
    config: ModelConfig,
    row_length: int,
    mode: AttentionMode,
    recompute: Collection[str],
    element_bytes: int,
    inputs: Inputs = PLAIN,
) -> dict[str, int]:
    """Bytes kept at the end of the forward pass, losses included, of a row of one document or many.

    recompute: as in TrainConfig. element_bytes: of the model's type. inputs: what products keep of theirs. Not counted:
    parameters and the row's own ids. In the indexer's warm-up all else is frozen and keeps nothing. loss: gradients of
    both heads, made with the logits.
    """
    kept = Counter[str]()
    for phase in phases(config, row_length, mode, recompute, element_bytes, inputs):
        kept += phase.kept
    return {part: kept[part] for part in PARTS if part in kept}


def phases(
    config: ModelConfig,
    row_length: int,
    mode: AttentionMode,
    recompute: Collection[str],
    width: int,
    inputs: Inputs = PLAIN,
    *,
    apart: int = 1,
    layers: range | None = None,
) -> list[Phase]:
    """The backward pass of a row in order: losses, MTP branch, last collapse, layers from the last one, places.

    width: bytes of an element of the model's type. apart: rows whose token-expert pairs meet and pass one by one.
    layers: the only ones that the row passes, default all; what is behind the last one comes with it.
    """
    layers, again = layers or range(config.num_hidden_layers), frozenset(recompute)
    row = Row(
        config=config,
        layers=layers,
        T=row_length,
        mode=mode,
        again=again,
        width=widths(width),
        apart=apart,
        inputs=inputs,
    )
    if mode == "indexer_warmup":
        return [Phase(trains=("",), kept=warmup(row))]
    found = _ends(row) if layers.stop == config.num_hidden_layers else []
    for layer in reversed(layers):
        found += _layer(row, f"layers.{layer}.", config.attention_ratios[layer], hashed=layer < config.num_hash_layers)
    ratios = frozenset(config.attention_ratios[layers.start : layers.stop])
    return [*found, Phase(trains=("embed.",), kept=places(row, ratios))]


def _ends(row: Row) -> list[Phase]:
    """Behind the last layer."""
    found = [Phase(trains=("head.",), kept=loss(row), working=logits(row))]
    branches = row.config.num_nextn_predict_layers if row.T > 1 else 0
    if branches:
        branch = replace(row, T=row.T - 1, again=row.again - {"block"})
        last = Phase(trains=("mtp.0.head.",), kept=loss(branch), working=logits(branch))
        found = [last, *found, *_mtp(branch)]
    return [*found, Phase(trains=("hc_head_", "norm."), kept=end(row, streams_kept=bool(branches)))]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A stretch of a block's backward pass. outside: kept around a part of the block; inside: in it, if it is kept.

    always: in it, whatever is computed again.
    """

    part: str
    outside: Counter[str]
    inside: Counter[str]
    always: Counter[str]
    phase: Phase


def _layer(row: Row, name: str, ratio: int, *, hashed: bool) -> list[Phase]:
    """One block from its end; all of it computed again, it keeps its streams, and its loads, until it is done."""
    steps = _steps(row, name, ratio, hashed=hashed)
    streams = Counter(streams=row.T * row.config.hc_mult * row.config.hidden_size * row.width.model)
    loads = Counter(router=row.config.n_routed_experts * INDEX_BYTES)
    found = []
    for number, step in enumerate(steps):
        if "block" in row.again:
            again = sum(later.outside.total() + later.inside.total() for later in steps[number:])
            kept, again = Counter[str](), again - streams.total()
        elif step.part in row.again:
            kept = step.outside
            again = sum(later.inside.total() for later in steps[number:] if later.part == step.part)
        else:
            kept, again = step.outside + step.inside, 0
        if step is steps[-1]:
            kept = kept + loads + (streams if "block" in row.again else Counter())
        found.append(replace(step.phase, kept=kept + step.always, again=again))
    return found


def _steps(row: Row, name: str, ratio: int, *, hashed: bool) -> tuple[_Step, _Step, _Step]:
    """Down to the experts' inner numbers, up to the site between, attention with the site before.

    A site keeps its streams; product and inverse RMS, post and comb; u, its norm's inverse; apart: the output y; h, if
    the part is computed again from it or a product keeps it.
    Working: gradients of streams and h; of SwiGLU nine tensors in at least fp32, copies, and its own gradient.
    """
    config, width, T = row.config, row.width, row.T
    D, N, F = config.hidden_size, config.hc_mult, config.moe_intermediate_size
    y = T * D * width.model
    mixes = ((2 + N) * N + 1 + N + N * N) * width.island
    site = N * y + T * (mixes + width.island) + y
    pairs, ffn, attn = row.pairs, f"{name}ffn.", f"{name}attn."
    all_inside, down = experts(row, ffn, hashed=hashed), inner(row, ffn)
    down["shared_experts"] = all_inside["shared_experts"]
    h_ffn = y if "experts" in row.again or experts_take(row, ffn) else 0
    h_attn = y if "attention" in row.again or attention_takes(row, ratio, attn) else 0
    flow = 2 * (N + 1) * y
    swiglu = pairs * F // row.apart * (8 * width.island + 3 * width.copy + width.model + MASK_BYTES)
    # Of the other rows: inner numbers before they pass; then gradients of what came in; gate, up and copies are gone.
    others = pairs * width.model * (row.apart - 1) // row.apart
    gone = copied(row, pairs, D, *upward(f"{ffn}experts."), matrices=row.matrices) * (row.apart - 1) // row.apart
    start = (f"{ffn}shared_experts.", f"{ffn}experts.w2")
    after = (f"{ffn}experts.w1", f"{ffn}experts.w3", f"{ffn}gate.", f"{name}ffn_norm.", f"{name}hc_ffn_")
    before = (attn, f"{name}attn_norm.", f"{name}hc_attn_")
    none = Counter[str]()
    upper = Phase(trains=after, kept=none, working=flow + swiglu, first=others * F, last=others * (D - 2 * F) - gone)
    return (
        _Step(
            part="experts",
            outside=Counter(streams=y),
            inside=down,
            always=experts_indices(row, ffn),
            phase=Phase(trains=start, kept=none, working=flow),
        ),
        _Step(
            part="experts",
            outside=Counter(streams=site + h_ffn),
            inside=all_inside - down,
            always=none,
            phase=upper,
        ),
        _Step(
            part="attention",
            outside=Counter(streams=site + h_attn + y),
            inside=attention(row, ratio, attn),
            always=attention_indices(row, ratio, attn),
            phase=Phase(trains=before, kept=none, working=flow),
        ),
    )


def _mtp(row: Row) -> list[Phase]:
    """The MTP branch: its end, a block of window attention, embedding and streams with their norms."""
    D, N, width, T = row.config.hidden_size, row.config.hc_mult, row.width, row.T
    name = "mtp.0."
    inputs = T * (D * width.model + (1 + N) * width.island + INDEX_BYTES)
    for rows, projection in ((T, f"{name}e_proj.weight"), (T * N, f"{name}h_proj.weight")):
        inputs += taken(row, rows, D, projection) + indices(row, rows, projection)
    return [
        Phase(trains=(f"{name}hc_head_", f"{name}norm."), kept=end(row, streams_kept=False)),
        *_layer(row, name, 0, hashed=False),
        Phase(
            trains=tuple(f"{name}{part}." for part in ("embed", "e_proj", "h_proj", "enorm", "hnorm")),
            kept=Counter(streams=inputs) + places(row, frozenset({0})),
        ),
    ]
