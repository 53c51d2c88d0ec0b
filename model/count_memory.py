"""Bytes that one row's forward pass keeps for its backward pass, by part, from the configuration alone.

Counted as the plain functions keep them, to the byte but for a few numbers per layer. Products with gradients to both
factors keep both; norms, mHC, attention and SwiGLU what their hand-written backward passes ask for. In a model of lower
precision than fp32 an island keeps a promoted copy of its input. Held by tests/model/test_count_memory.py.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

from model.config import CSA_RATIO, AttentionMode, ModelConfig

FP32_BYTES = 4
INDEX_BYTES = 8
"""Positions, slots and experts are int64."""
MASK_BYTES = 1
PARTS = (
    "places", "streams", "attention", "compressor", "indexer", "router", "experts", "shared_experts", "loss",
)  # fmt: skip
LOGIT_ROWS = 1024
"""`model.losses.CHUNK`: tokens whose logits exist at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Widths:
    """Bytes of a number of the model's type and of an island; copy: of one promoted on the way into an island."""

    model: int
    island: int

    @property
    def copy(self) -> int:
        return self.island if self.model < self.island else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """What is the same for all layers of a branch: T tokens, attention mode, parts that are computed again.

    apart: parts of the token-expert pairs of which one at a time passes through the experts.
    """

    config: ModelConfig
    T: int
    mode: AttentionMode
    again: frozenset[str]
    width: _Widths
    apart: int


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
    config: ModelConfig, row_length: int, mode: AttentionMode, recompute: Collection[str], element_bytes: int
) -> dict[str, int]:
    """Bytes kept at the end of the forward pass, losses included, of a row of one document or many.

    recompute: as in TrainConfig. element_bytes: of the model's type. Not counted: parameters and the row's own ids. In
    the indexer's warm-up all else is frozen and keeps nothing. loss: gradients of both heads, made with the logits.
    """
    kept = Counter[str]()
    for phase in phases(config, row_length, mode, recompute, element_bytes):
        kept += phase.kept
    return {part: kept[part] for part in PARTS if part in kept}


def phases(
    config: ModelConfig, row_length: int, mode: AttentionMode, recompute: Collection[str], width: int, apart: int = 1
) -> list[Phase]:
    """The backward pass of a row in order: losses, MTP branch, last collapse, layers from the last one, places.

    width: bytes of an element of the model's type. apart: rows whose token-expert pairs meet and pass one by one.
    """
    widths = _Widths(model=width, island=max(width, FP32_BYTES))
    row = _Row(config=config, T=row_length, mode=mode, again=frozenset(recompute), width=widths, apart=apart)
    if mode == "indexer_warmup":
        return [Phase(trains=("",), kept=_warmup(row))]
    found = [Phase(trains=("head.",), kept=_loss(row), working=_logits(row))]
    branches = config.num_nextn_predict_layers if row_length > 1 else 0
    if branches:
        branch = replace(row, T=row_length - 1, again=row.again - {"block"})
        last = Phase(trains=("mtp.0.head.",), kept=_loss(branch), working=_logits(branch))
        found = [last, *found, *_mtp(branch)]
    found.append(Phase(trains=("hc_head_", "norm."), kept=_end(row, streams_kept=bool(branches))))
    for layer in reversed(range(config.num_hidden_layers)):
        found += _layer(row, f"layers.{layer}.", config.attention_ratios[layer], hashed=layer < config.num_hash_layers)
    return [*found, Phase(trains=("embed.",), kept=_places(row, frozenset(config.attention_ratios)))]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A stretch of a block's backward pass. outside: kept around a part of the block; inside: in it, if it is kept."""

    part: str
    outside: Counter[str]
    inside: Counter[str]
    phase: Phase


def _layer(row: _Row, name: str, ratio: int, *, hashed: bool) -> list[Phase]:
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
        found.append(replace(step.phase, kept=kept, again=again))
    return found


def _steps(row: _Row, name: str, ratio: int, *, hashed: bool) -> tuple[_Step, _Step, _Step]:
    """Down to the experts' inner numbers, up to the site between, attention with the site before.

    A site keeps its streams; product and inverse RMS, post and comb; u, its norm's inverse, h; apart: the output y.
    Working: gradients of streams and h; of SwiGLU nine tensors in at least fp32, copies, and its own gradient.
    """
    config, width, T = row.config, row.width, row.T
    D, N, F = config.hidden_size, config.hc_mult, config.moe_intermediate_size
    y = T * D * width.model
    mixes = ((2 + N) * N + 1 + N + N * N) * width.island
    site = N * y + T * (mixes + width.island) + 2 * y
    pairs = T * config.num_experts_per_tok
    experts, down = _experts(row, hashed=hashed), Counter(shared_experts=3 * T * F * width.model)
    down["experts"] = pairs * F * width.model
    flow = 2 * (N + 1) * y
    swiglu = pairs * F // row.apart * (8 * width.island + 3 * width.copy + width.model + MASK_BYTES)
    # Of the other rows: inner numbers before they pass; then gradients of what came in, gate and up gone.
    others = pairs * width.model * (row.apart - 1) // row.apart
    ffn, attn = f"{name}ffn.", f"{name}attn"
    start = (f"{ffn}shared_experts.", f"{ffn}experts.w2")
    after = (f"{ffn}experts.w1", f"{ffn}experts.w3", f"{ffn}gate.", f"{name}ffn_norm.", f"{name}hc_ffn_")
    before = (f"{attn}.", f"{attn}_norm.", f"{name}hc_attn_")
    none = Counter[str]()
    upper = Phase(trains=after, kept=none, working=flow + swiglu, first=others * F, last=others * (D - 2 * F))
    return (
        _Step(
            part="experts",
            outside=Counter(streams=y),
            inside=down,
            phase=Phase(trains=start, kept=none, working=flow),
        ),
        _Step(part="experts", outside=Counter(streams=site), inside=experts - down, phase=upper),
        _Step(
            part="attention",
            outside=Counter(streams=site + y),
            inside=_attention(row, ratio),
            phase=Phase(trains=before, kept=none, working=flow),
        ),
    )


def _attention(row: _Row, ratio: int) -> Counter[str]:
    """From h to y, both apart: latent, queries, keys and outputs, each before and after what follows it."""
    config, width = row.config, row.width
    H, C, Q, R = config.num_attention_heads, config.head_dim, config.q_lora_rank, config.qk_rope_head_dim
    numbers = 2 * Q + 4 * H * C + 2 * C + config.o_groups * config.o_lora_rank
    # Inverse RMS of the latent, of each head, of the keys; log denominators; sines of the way back.
    island = 1 + H + 1 + H + R // 2
    kept = Counter(attention=row.T * (numbers * width.model + island * width.island))
    if ratio:
        kept["compressor"] += _compressor(row, C, ratio, detached=False)
    if ratio == CSA_RATIO and row.mode != "dense":
        kept["indexer"] += _indexer(row)
    return kept


def _compressor(row: _Row, channels: int, ratio: int, *, detached: bool) -> int:
    """Promoted inputs of wkv and wgate, places of the tokens, values and weights of each block, entries.

    detached: the input asks for no gradient, so the promoted weights are not kept.
    """
    D, T, width, slots = row.config.hidden_size, row.T, row.width, row.T // ratio
    series = 2 if ratio == CSA_RATIO else 1
    copies = 2 * (T + (0 if detached else series * channels)) * D * width.copy
    values = 2 * slots * series * ratio * channels * width.island
    entries = slots * (channels * (width.island + width.model) + width.island)
    masks = slots * MASK_BYTES if ratio == CSA_RATIO else 0
    return copies + 2 * T * INDEX_BYTES + values + entries + masks


def _indexer(row: _Row) -> int:
    """Queries, head weights, keys, what is counted, and in the sparse stage the selection."""
    config, width = row.config, row.width
    heads, channels = config.index_n_heads, config.index_head_dim
    queries = row.T * heads * (channels * width.model + width.island)
    selected = min(config.index_topk, row.T // CSA_RATIO) if row.mode == "sparse" else 0
    keys = _compressor(row, channels, CSA_RATIO, detached=True)
    return queries + keys + row.T * (MASK_BYTES + selected * INDEX_BYTES)


def _experts(row: _Row, *, hashed: bool) -> Counter[str]:
    """From h to y, both apart: router, token-expert pairs, gate, up and inner of routed and shared experts."""
    config, T, width = row.config, row.T, row.width
    D, F = config.hidden_size, config.moe_intermediate_size
    E, K = config.n_routed_experts, config.num_experts_per_tok
    # Scores: logits, clamped, rooted. Weights: scaled, and the sum they are divided by.
    router = (T + E) * D * width.copy + T * ((3 * E + K + 1) * width.island + K * INDEX_BYTES)
    if not hashed:
        router += T * ((1 + E) * width.island + MASK_BYTES)
    pairs = T * K * ((D + 3 * F) * width.model + width.island + 2 * INDEX_BYTES)
    return Counter(router=router, experts=pairs, shared_experts=3 * T * F * width.model)


def _loss(row: _Row) -> Counter[str]:
    """Gradients behind a head, of its input and of itself, made in the forward pass."""
    config = row.config
    return Counter(loss=(row.T + config.vocab_size) * config.hidden_size * row.width.model)


def _logits(row: _Row) -> int:
    """What the last loss makes on top of what it keeps: promoted weight, its gradient, logits and probabilities."""
    config, width = row.config, row.width
    weight = config.vocab_size * config.hidden_size * (width.copy + width.island)
    logits = 2 * min(row.T, LOGIT_ROWS) * config.vocab_size * width.island
    return max(0, weight + logits - _loss(row).total())


def _end(row: _Row, *, streams_kept: bool) -> Counter[str]:
    """The last collapse and norm. streams_kept: another part keeps the last streams; else their copies may do."""
    D, N, width = row.config.hidden_size, row.config.hc_mult, row.width
    own = N * D * width.model if streams_kept or not width.copy else 0
    mixes = (4 * N + 1) * width.island
    return Counter(streams=row.T * (own + 2 * N * D * width.copy + mixes + 2 * D * width.model + width.island))


def _mtp(row: _Row) -> list[Phase]:
    """The MTP branch: its end, a block of window attention, embedding and streams with their norms."""
    D, N, width = row.config.hidden_size, row.config.hc_mult, row.width
    inputs = (2 * D + N * D) * width.model + (1 + N) * width.island + INDEX_BYTES
    name = "mtp.0."
    return [
        Phase(trains=(f"{name}hc_head_", f"{name}norm."), kept=_end(row, streams_kept=False)),
        *_layer(row, name, 0, hashed=False),
        Phase(
            trains=tuple(f"{name}{part}." for part in ("embed", "e_proj", "h_proj", "enorm", "hnorm")),
            kept=Counter(streams=row.T * inputs) + _places(row, frozenset({0})),
        ),
    ]


def _places(row: _Row, ratios: frozenset[int]) -> Counter[str]:
    """Ranges of windows and blocks by rate, and the rotations of the layers' rates; recomputation holds all of them."""
    config, T = row.config, row.T
    every = frozenset(config.attention_ratios)
    if row.again & {"attention", "block"}:
        ratios = every | {0}
    ranges = T + sum(3 * T + T // rate * (1 + rate) for rate in every if rate)
    masks = sum(T // rate for rate in every if rate)
    turned = T * (int(0 in ratios) + int(bool(ratios - {0}))) + sum(T // rate for rate in ratios if rate)
    turns = turned * config.qk_rope_head_dim * row.width.island
    return Counter(places=ranges * INDEX_BYTES + masks * MASK_BYTES + turns)


def _warmup(row: _Row) -> Counter[str]:
    """Only indexers learn: their own tensors, the inputs they share with attention, and what they are to predict.

    The results of both branches are held until the row is done.
    """
    config, T, width = row.config, row.T, row.width
    H, C, D, Q = config.num_attention_heads, config.head_dim, config.hidden_size, config.q_lora_rank
    inputs = T * (D + Q) * width.model
    target = T * H * (C * width.model + width.island) + T // CSA_RATIO * C * width.model
    indexer = inputs + target + _indexer(row)
    if "attention" in row.again:
        indexer = T * D * width.model
    if "block" in row.again:
        indexer = T * config.hc_mult * D * width.model
    layers, branches = config.attention_ratios, config.num_nextn_predict_layers
    results = Counter(streams=(T + branches * (T - 1)) * D * width.model)
    loads = Counter(router=(len(layers) + branches) * config.n_routed_experts * INDEX_BYTES)
    return results + loads + _places(row, frozenset({CSA_RATIO})) + Counter(indexer=layers.count(CSA_RATIO) * indexer)
