"""Bytes that one row's forward pass keeps for its backward pass, by part, from the configuration alone.

Counted as the plain functions keep them, to the byte but for a few numbers per layer. Products with gradients to both
factors keep both; norms, mHC, attention and SwiGLU what their hand-written backward passes ask for. In a model of lower
precision than fp32 an island keeps a promoted copy of its input. Held by tests/model/test_count_memory.py.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from model.config import CSA_RATIO, AttentionMode, ModelConfig

FP32_BYTES = 4
INDEX_BYTES = 8
"""Positions, slots and experts are int64."""
MASK_BYTES = 1


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
    """What is the same for all layers of a branch: T tokens, attention mode, parts that are computed again."""

    config: ModelConfig
    T: int
    mode: AttentionMode
    again: frozenset[str]
    width: _Widths


def kept_bytes(
    config: ModelConfig, row_length: int, mode: AttentionMode, recompute: Collection[str], element_bytes: int
) -> dict[str, int]:
    """Bytes kept at the end of the forward pass, losses included, of a row of one document or many.

    recompute: as in TrainConfig. element_bytes: of the model's type. Not counted: parameters and the row's own ids. In
    the indexer's warm-up all else is frozen and keeps nothing. loss: gradients of both heads, made with the logits.
    """
    width = _Widths(model=element_bytes, island=max(element_bytes, FP32_BYTES))
    row = _Row(config=config, T=row_length, mode=mode, again=frozenset(recompute), width=width)
    if mode == "indexer_warmup":
        return dict(_warmup(row))
    kept = _places(row, frozenset(config.attention_ratios))
    for layer, ratio in enumerate(config.attention_ratios):
        kept += _layer(row, ratio, hashed=layer < config.num_hash_layers, whole="block" in row.again)
    branches = config.num_nextn_predict_layers if row_length > 1 else 0
    kept += _end(row, streams_kept=bool(branches))
    if branches:
        kept += _mtp(_Row(config=config, T=row_length - 1, mode=mode, again=row.again - {"block"}, width=width))
    return dict(kept)


def again_bytes(
    config: ModelConfig, row_length: int, mode: AttentionMode, recompute: Collection[str], element_bytes: int
) -> int:
    """Bytes that are kept on top while the largest of the recomputed parts goes through its backward pass."""
    if mode == "indexer_warmup" or not recompute:
        return 0
    width = _Widths(model=element_bytes, island=max(element_bytes, FP32_BYTES))
    once = _Row(config=config, T=row_length, mode=mode, again=frozenset(), width=width)
    parts = []
    for layer, ratio in enumerate(config.attention_ratios):
        hashed = layer < config.num_hash_layers
        if "block" in recompute:
            parts.append(_layer(once, ratio, hashed=hashed, whole=False).total())
        if "attention" in recompute:
            parts.append(_attention(once, ratio).total())
        if "experts" in recompute:
            parts.append(_experts(once, hashed=hashed).total())
    return max(parts)


def _layer(row: _Row, ratio: int, *, hashed: bool, whole: bool) -> Counter[str]:
    """One block from its streams on; whole: all of it is computed again, and only these are kept, and its loads."""
    D, N, width = row.config.hidden_size, row.config.hc_mult, row.width
    streams = row.T * N * D * width.model
    kept = Counter(streams=streams, router=row.config.n_routed_experts * INDEX_BYTES)
    if whole:
        return kept
    # Each of two sites: its streams; product and inverse RMS, post and comb; u, its norm's inverse, h; the output y.
    mixes = ((2 + N) * N + 1 + N + N * N) * width.island
    kept["streams"] += streams + 2 * row.T * (mixes + 3 * D * width.model + width.island)
    if "attention" not in row.again:
        kept += _attention(row, ratio)
    if "experts" not in row.again:
        kept += _experts(row, hashed=hashed)
    return kept


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


def _end(row: _Row, *, streams_kept: bool) -> Counter[str]:
    """The last collapse and norm, and the loss behind the head.

    streams_kept: the last streams are kept by another part too; else only their promoted copies are.
    """
    D, N, width = row.config.hidden_size, row.config.hc_mult, row.width
    own = N * D * width.model if streams_kept or not width.copy else 0
    mixes = (4 * N + 1) * width.island
    streams = row.T * (own + 2 * N * D * width.copy + mixes + 2 * D * width.model + width.island)
    return Counter(streams=streams, loss=(row.T + row.config.vocab_size) * D * width.model)


def _mtp(row: _Row) -> Counter[str]:
    """The MTP branch: embedding and streams with their norms, a block of window attention, its own end."""
    D, N, width = row.config.hidden_size, row.config.hc_mult, row.width
    inputs = (2 * D + N * D) * width.model + (1 + N) * width.island + INDEX_BYTES
    kept = Counter(streams=row.T * inputs)
    kept += _places(row, frozenset({0}))
    return kept + _layer(row, 0, hashed=False, whole=False) + _end(row, streams_kept=False)


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
