"""Bytes that one row keeps in each part of the model, as `model.count_memory` adds them up.

Counted as the plain functions keep them: the products' factors, what hand-written backward passes ask for, promoted
copies of what enters islands.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

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
class Copy:
    """What a product keeps of its input in place of the input: so many bytes for a number, and one for each block.

    block: rows x columns with a scale, None: no scales. side: the rows that one matrix multiplies are filled up to a
    multiple of it, by an index that is kept whatever is computed again; filled: what is kept is so, too.
    """

    number_bytes: int
    block: tuple[int, int] | None
    side: int = 1
    filled: bool = False

    def size(self, rows: int, columns: int, matrices: int) -> int:
        """Bytes of rows [rows, columns] that so many matrices share out; of several, for the shares that take most."""
        kept = self._most(rows, matrices) if self.filled else rows
        scales = -(-kept // self.block[0]) * -(-columns // self.block[1]) if self.block else 0
        return kept * columns * self.number_bytes + scales

    def index_bytes(self, rows: int, matrices: int) -> int:
        """Of where each row goes."""
        return rows * INDEX_BYTES if self._most(rows, matrices) > rows else 0

    def _most(self, rows: int, matrices: int) -> int:
        return (rows + min(rows, matrices) * (self.side - 1)) // self.side * self.side


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """How products keep their inputs: copies, by parameter; without one the input itself, which several can share.

    matrices: of a layer's w1, that share out the token-expert pairs of a row; 0: one for each routed expert.
    """

    copies: Mapping[str, Copy] = field(default_factory=dict)
    matrices: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is the same for all layers of a branch: T tokens, attention mode, parts that are computed again.

    layers: those of the model that the row passes. apart: parts of the token-expert pairs of which one at a time passes
    through the experts. inputs: of the products.
    """

    config: ModelConfig
    layers: range
    T: int
    mode: AttentionMode
    again: frozenset[str]
    width: Widths
    apart: int
    inputs: Inputs

    @property
    def pairs(self) -> int:
        """Of tokens and experts."""
        return self.T * self.config.num_experts_per_tok

    @property
    def matrices(self) -> int:
        """Of a layer's w1 that share them out."""
        return self.inputs.matrices or self.config.n_routed_experts


def copied(row: Row, rows: int, columns: int, *names: str, matrices: int = 1) -> int:
    """Bytes of the copies that the products with these parameters keep of their input [rows, columns]."""
    copies = row.inputs.copies
    return sum(copies[name].size(rows, columns, matrices) for name in names if name in copies)


def indices(row: Row, rows: int, *names: str, matrices: int = 1) -> int:
    """Bytes of where the rows of an input go in the products with these parameters."""
    copies = row.inputs.copies
    return sum(copies[name].index_bytes(rows, matrices) for name in names if name in copies)


def keeps_itself(row: Row, *names: str) -> bool:
    """Whether one of the products with these parameters keeps the input itself."""
    return any(name not in row.inputs.copies for name in names)


def taken(row: Row, rows: int, columns: int, *names: str, matrices: int = 1) -> int:
    """Bytes of an input that nobody keeps but the products with these parameters: copies, and itself once if asked."""
    itself = rows * columns * row.width.model if keeps_itself(row, *names) else 0
    return itself + copied(row, rows, columns, *names, matrices=matrices)


def attention(row: Row, ratio: int, name: str) -> Counter[str]:
    """From h to y, both apart: latent, queries, keys and outputs, each before and after what follows it."""
    config, width, T = row.config, row.width, row.T
    H, C, Q, R = config.num_attention_heads, config.head_dim, config.q_lora_rank, config.qk_rope_head_dim
    G, learns = config.o_groups, has_indexer(row, ratio)
    numbers = Q + 3 * H * C + 2 * C
    # Inverse RMS of the latent, of each head, of the keys; log denominators; sines of the way back.
    island = 1 + H + 1 + H + R // 2
    latent = (f"{name}wq_b.weight", *([f"{name}indexer.wq_b.weight"] if learns else []))
    products = G * taken(row, T, H * C // G, f"{name}wo_a.weight")
    products += taken(row, T, G * config.o_lora_rank, f"{name}wo_b.weight") + taken(row, T, Q, *latent)
    products += copied(row, T, config.hidden_size, f"{name}wq_a.weight", f"{name}wkv.weight")
    kept = Counter(attention=T * (numbers * width.model + island * width.island) + products)
    if ratio:
        kept["compressor"] += _compressor(row, C, ratio, detached=False)
    if learns:
        kept["indexer"] += _indexer(row)
    return kept


def attention_indices(row: Row, ratio: int, name: str) -> Counter[str]:
    """Of all its products."""
    products = indices(row, row.T, *(f"{name}{one}.weight" for one in ("wq_a", "wq_b", "wkv", "wo_b")))
    products += row.config.o_groups * indices(row, row.T, f"{name}wo_a.weight")
    products += indices(row, row.T, f"{name}indexer.wq_b.weight") if has_indexer(row, ratio) else 0
    return Counter(attention=products)


def has_indexer(row: Row, ratio: int) -> bool:
    """Whether the layers of this ratio use one."""
    return ratio == CSA_RATIO and row.mode != "dense"


def attention_takes(row: Row, ratio: int, name: str) -> bool:
    """Whether attention keeps h itself; a compressor does unless it promotes it."""
    names = [f"{name}wq_a.weight", f"{name}wkv.weight"]
    names += [f"{name}compressor.wkv.weight"] if ratio and not row.width.copy else []
    return keeps_itself(row, *names, *([f"{name}indexer.weights_proj.weight"] if has_indexer(row, ratio) else []))


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


def experts(row: Row, name: str, *, hashed: bool) -> Counter[str]:
    """From h to y, both apart: router, token-expert pairs, gate, up and inner of routed and shared experts."""
    config, T, width = row.config, row.T, row.width
    D, F = config.hidden_size, config.moe_intermediate_size
    E, K = config.n_routed_experts, config.num_experts_per_tok
    # Scores: logits, clamped, rooted. Weights: scaled, and the sum they are divided by.
    router = (T + E) * D * width.copy + T * ((3 * E + K + 1) * width.island + K * INDEX_BYTES)
    if not hashed:
        router += T * ((1 + E) * width.island + MASK_BYTES)
    pairs = row.pairs * (2 * F * width.model + width.island + 2 * INDEX_BYTES)
    pairs += taken(row, row.pairs, D, *upward(f"{name}experts."), matrices=row.matrices)
    shared = 2 * T * F * width.model + copied(row, T, D, *upward(f"{name}shared_experts.", ".weight"))
    return Counter(router=router, experts=pairs, shared_experts=shared) + inner(row, name)


def inner(row: Row, name: str) -> Counter[str]:
    """What the last products of routed and shared experts keep."""
    F = row.config.moe_intermediate_size
    return Counter(
        experts=taken(row, row.pairs, F, f"{name}experts.w2", matrices=row.matrices),
        shared_experts=taken(row, row.T, F, f"{name}shared_experts.w2.weight"),
    )


def experts_indices(row: Row, name: str) -> Counter[str]:
    """Of all their products."""
    kinds = ("w1", "w3", "w2")
    return Counter(
        experts=indices(row, row.pairs, *(f"{name}experts.{kind}" for kind in kinds), matrices=row.matrices),
        shared_experts=indices(row, row.T, *(f"{name}shared_experts.{kind}.weight" for kind in kinds)),
    )


def experts_take(row: Row, name: str) -> bool:
    """Whether router or shared expert keep h itself; the router does unless it promotes it."""
    names = upward(f"{name}shared_experts.", ".weight")
    return keeps_itself(row, *names, *([] if row.width.copy else [f"{name}gate.weight"]))


def upward(name: str, end: str = "") -> tuple[str, str]:
    """The parameters of an expert that take a token."""
    return f"{name}w1{end}", f"{name}w3{end}"


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
    """Only indexers learn: their own tensors, h and latent, and what they are to predict.

    The results of both branches are held until the row is done.
    """
    config, T, width = row.config, row.T, row.width
    H, C, D, Q = config.num_attention_heads, config.head_dim, config.hidden_size, config.q_lora_rank
    target = T * H * (C * width.model + width.island) + T // CSA_RATIO * C * width.model
    own = T * D * width.model + target + _indexer(row)
    having = [layer for layer in row.layers if config.attention_ratios[layer] == CSA_RATIO]
    latents = (taken(row, T, Q, f"layers.{layer}.attn.indexer.wq_b.weight") for layer in having)
    indexers = len(having) * own + sum(latents)
    if "attention" in row.again:
        indexers = len(having) * T * D * width.model
    if "block" in row.again:
        indexers = len(having) * T * config.hc_mult * D * width.model
    is_last = row.layers.stop == config.num_hidden_layers
    branches = config.num_nextn_predict_layers if is_last else 0
    results = Counter(streams=(T * is_last + branches * (T - 1)) * D * width.model)
    loads = Counter(router=(len(row.layers) + branches) * config.n_routed_experts * INDEX_BYTES)
    return results + loads + places(row, frozenset({CSA_RATIO})) + Counter(indexer=indexers)
