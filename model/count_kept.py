"""Bytes that one row keeps in each part of the model, as `model.count_memory` adds them up.

Counted as the plain functions keep them: the products' factors, what hand-written backward passes ask for, promoted
copies of what enters islands.
"""

from collections import Counter
from dataclasses import dataclass

from model.config import CSA_RATIO, AttentionMode, ModelConfig

FP32_BYTES = 4
INDEX_BYTES = 8
"""Positions, slots and experts are int64."""
MASK_BYTES = 1
LOGIT_ROWS = 1024
"""`model.losses.CHUNK`: tokens whose logits exist at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Bytes of a number of the model's type and of an island; copy: of one promoted on the way into an island."""

    model: int
    island: int

    @property
    def copy(self) -> int:
        return self.island if self.model < self.island else 0


def widths(element_bytes: int) -> Widths:
    """Of a model whose numbers have so many bytes."""
    return Widths(model=element_bytes, island=max(element_bytes, FP32_BYTES))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is the same for all layers of a branch: T tokens, attention mode, parts that are computed again.

    layers: those of the model that the row passes. apart: parts of the token-expert pairs of which one at a time passes
    through the experts.
    """

    config: ModelConfig
    layers: range
    T: int
    mode: AttentionMode
    again: frozenset[str]
    width: Widths
    apart: int


def attention(row: Row, ratio: int) -> Counter[str]:
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


def _compressor(row: Row, channels: int, ratio: int, *, detached: bool) -> int:
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


def _indexer(row: Row) -> int:
    """Queries, head weights, keys, what is counted, and in the sparse stage the selection."""
    config, width = row.config, row.width
    heads, channels = config.index_n_heads, config.index_head_dim
    queries = row.T * heads * (channels * width.model + width.island)
    selected = min(config.index_topk, row.T // CSA_RATIO) if row.mode == "sparse" else 0
    keys = _compressor(row, channels, CSA_RATIO, detached=True)
    return queries + keys + row.T * (MASK_BYTES + selected * INDEX_BYTES)


def experts(row: Row, *, hashed: bool) -> Counter[str]:
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


def loss(row: Row) -> Counter[str]:
    """Gradients behind a head, of its input and of itself, made in the forward pass."""
    config = row.config
    return Counter(loss=(row.T + config.vocab_size) * config.hidden_size * row.width.model)


def logits(row: Row) -> int:
    """What the last loss makes on top of what it keeps: promoted weight, its gradient, logits and probabilities."""
    config, width = row.config, row.width
    weight = config.vocab_size * config.hidden_size * (width.copy + width.island)
    logits = 2 * min(row.T, LOGIT_ROWS) * config.vocab_size * width.island
    return max(0, weight + logits - loss(row).total())


def end(row: Row, *, streams_kept: bool) -> Counter[str]:
    """The last collapse and norm. streams_kept: another part keeps the last streams; else their copies may do."""
    D, N, width = row.config.hidden_size, row.config.hc_mult, row.width
    own = N * D * width.model if streams_kept or not width.copy else 0
    mixes = (4 * N + 1) * width.island
    return Counter(streams=row.T * (own + 2 * N * D * width.copy + mixes + 2 * D * width.model + width.island))


def places(row: Row, ratios: frozenset[int]) -> Counter[str]:
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


def warmup(row: Row) -> Counter[str]:
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
    layers = config.attention_ratios[row.layers.start : row.layers.stop]
    is_last = row.layers.stop == config.num_hidden_layers
    branches = config.num_nextn_predict_layers if is_last else 0
    results = Counter(streams=(T * is_last + branches * (T - 1)) * D * width.model)
    loads = Counter(router=(len(layers) + branches) * config.n_routed_experts * INDEX_BYTES)
    return results + loads + places(row, frozenset({CSA_RATIO})) + Counter(indexer=layers.count(CSA_RATIO) * indexer)
