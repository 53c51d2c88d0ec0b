"""Parameters and training FLOP of a model, from its configuration alone: integers, nothing allocated.

Parameters are sums over `model.inventory`. FLOP follow the usual convention for utilisation: matrix products only, two
FLOP per multiply-add, forward and backward, recomputation not counted. Source: spec 1.2, 1.3, 2-4 and 9.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from model.config import CSA_RATIO, AttentionMode, ModelConfig, require
from model.inventory import TensorSpec, released_tensors

FLOP_PER_MAC = 2
FORWARD = 1
TRAINED = 3
"""Products with a gradient to both factors: one forward, two backward."""
DETACHED = 2
"""Linear maps whose input is detached (the indexer's): one forward, one backward for the weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Parameters by part. `buffers` (router bias, hash table) have no gradient and are in no other number."""

    main: dict[str, int]
    mtp: dict[str, int]
    active: dict[str, int]
    buffers: int

    @property
    def total_main(self) -> int:
        """The headline figure: everything but the MTP block."""
        return sum(self.main.values())

    @property
    def total_mtp(self) -> int:
        return sum(self.mtp.values())

    @property
    def total(self) -> int:
        """What training stores: main model and MTP block."""
        return self.total_main + self.total_mtp

    @property
    def total_active(self) -> int:
        """N_active of the rule of thumb 6 N_active D."""
        return sum(self.active.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFlops:
    """FLOP of one row, forward and backward, by part, exact."""

    row_length: int
    main: dict[str, int]
    mtp: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.main.values()) + sum(self.mtp.values())

    @property
    def per_token(self) -> float:
        """FLOP per token: the exact mean over the positions of the row."""
        return self.total / self.row_length


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """FLOP of one row's way through a part of the model, forwards and backwards."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(forward=self.forward + other.forward, backward=self.backward + other.backward)


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthFlops:
    """FLOP of one row by depth: of each main layer, and of what follows the last one: collapse, head, MTP branch."""

    layers: tuple[Passes, ...]
    end: Passes


def parameters(config: ModelConfig) -> Counts:
    """Parameters with a gradient by part of the model, the MTP block apart.

    Active per token (spec 1.2): of the main model all parameters but the embedding, whose table is only looked up;
    lm_head, norms, mHC, router and indexer included; of the routed experts the K chosen ones, and the shared expert.
    In units of 1e9, main - embedding - experts + chosen experts = active; Flash: 284.332 - 0.530 - 277.025 + 6.493 =
    13.270, and 6.610 in the MTP block; Pro: 1572.997 - 0.927 - 1547.396 + 24.178 = 48.852, and 25.840.
    """
    main, mtp, active, buffers = Counter[str](), Counter[str](), Counter[str](), 0
    for spec in released_tensors(config, experts=1):
        routed = spec.group == "experts"
        stored = spec.size * (config.n_routed_experts if routed else 1)
        if spec.kind == "buffer":
            buffers += stored
            continue
        (mtp if spec.is_mtp else main)[spec.group] += stored
        if not spec.is_mtp and spec.group != "embedding":
            active[spec.group] += spec.size * (config.num_experts_per_tok if routed else 1)
    return Counts(main=dict(main), mtp=dict(mtp), active=dict(active), buffers=buffers)


def training_flops(config: ModelConfig, row_length: int, mode: AttentionMode) -> RowFlops:
    """Forward and backward FLOP of one row of `row_length` tokens that is one document, in one attention mode.

    Counted: linear maps; attention and index scores over the keys a query really sees; the products of mHC; the MTP
    block and its use of the head at the row_length - 1 positions that have a next token. Not counted: everything
    elementwise, reductions, lookups, recomputation, the optimizer. A row of several documents needs less, for windows
    and blocks restart. Modes: dense runs no indexer; indexer_warmup runs the model forward and trains the indexer on
    all visible blocks; sparse trains everything, with index scores forward for all visible blocks, backward for the
    selected ones. Raises ValueError for a row of no token.
    """
    require(row_length > 0, "row_length", row_length, "at least one token")
    factor = FLOP_PER_MAC * (FORWARD if mode == "indexer_warmup" else TRAINED)
    main = {part: factor * macs for part, macs in _main_macs(config, row_length, mode).items()}
    mtp = {part: factor * macs for part, macs in _mtp_macs(config, row_length - 1).items()}
    if mode != "dense":
        main |= _indexer_flops(config, row_length, mode)
    return RowFlops(row_length=row_length, main=main, mtp=mtp)


def depth_flops(config: ModelConfig, row_length: int, mode: AttentionMode) -> DepthFlops:
    """The same FLOP by depth, forward and backward apart: what a pipeline shares out. Their sum is that of the row.

    The embedding is looked up and has none; each layer has its two mHC sites, the end the last collapse.
    """
    require(row_length > 0, "row_length", row_length, "at least one token")
    of_layers: list[list[TensorSpec]] = [[] for _ in range(config.num_hidden_layers)]
    last: list[TensorSpec] = []
    for spec in released_tensors(config, experts=1):
        parts = spec.name.split(".")
        if not spec.is_mtp and spec.group != "indexer":
            (of_layers[int(parts[1])] if parts[0] == "layers" else last).append(spec)
    ending = _linear_macs(config, last, row_length).total() + row_length * _stream_macs(config, 0)
    ending += _mtp_macs(config, row_length - 1).total()
    indexer = _indexer_passes(config, row_length, mode)
    layers = []
    for specs, ratio in zip(of_layers, config.attention_ratios, strict=True):
        macs = _linear_macs(config, specs, row_length) + _attention_macs(config, [ratio], row_length, mode)
        streams = row_length * (_stream_macs(config, 1) - _stream_macs(config, 0))
        passes = _passes(macs.total() + streams, mode)
        layers.append(passes + indexer if ratio == CSA_RATIO and mode != "dense" else passes)
    return DepthFlops(layers=tuple(layers), end=_passes(ending, mode))


def forward_macs(config: ModelConfig, positions: int, mode: AttentionMode) -> Counter[str]:
    """Multiply-adds of the main model's forward pass over one row by part, counted as in `training_flops`.

    The indexer runs in the sparse mode only, where the selection needs it.
    """
    macs = _main_macs(config, positions, mode)
    if mode == "sparse":
        linear, pair = _indexer_macs(config)
        macs.update(indexer=positions * linear, indexer_scores=pair * block_pairs(positions, CSA_RATIO))
    return macs


def rule_of_thumb(config: ModelConfig, tokens: int) -> int:
    """6 N_active D: what is usually quoted (spec 6); it knows neither attention nor MTP."""
    return 6 * parameters(config).total_active * tokens


def window_pairs(row_length: int, window: int) -> int:
    """Query-key pairs of the causal window over a row: sum over t of min(t + 1, window)."""
    full = max(0, row_length - window)
    ramp = row_length - full
    return ramp * (ramp + 1) // 2 + full * window


def block_pairs(row_length: int, ratio: int, limit: int | None = None) -> int:
    """Query-block pairs over a row: sum over t of min(floor((t + 1) / ratio), limit) (spec 3.4).

    Each number of blocks n >= 1 is seen from `ratio` positions, the last only until the row ends.
    """
    blocks, rest = divmod(row_length, ratio)
    most = blocks if limit is None else min(blocks, limit)
    capped = ratio * (blocks - most) + rest + 1
    return ratio * (most * (most - 1) // 2) + capped * most


def _main_macs(config: ModelConfig, positions: int, mode: AttentionMode) -> Counter[str]:
    """Multiply-adds of the main model's forward pass over one row, without the indexer."""
    specs = [spec for spec in released_tensors(config, experts=1) if not spec.is_mtp and spec.group != "indexer"]
    macs = _linear_macs(config, specs, positions)
    macs.update(_attention_macs(config, config.attention_ratios, positions, mode))
    macs["mhc"] += positions * _stream_macs(config, config.num_hidden_layers)
    return macs


def _mtp_macs(config: ModelConfig, positions: int) -> Counter[str]:
    """Multiply-adds of the MTP branch over one row, its use of the shared head included; nothing without MTP."""
    if not config.num_nextn_predict_layers:
        return Counter()
    specs = [spec for spec in released_tensors(config, experts=1) if spec.is_mtp]
    macs = _linear_macs(config, specs, positions)
    # Window attention only, so that the mode makes no difference.
    macs.update(_attention_macs(config, config.compress_ratios[config.num_hidden_layers :], positions, "dense"))
    macs["mhc"] += positions * _stream_macs(config, 1)
    macs["head"] += positions * config.vocab_size * config.hidden_size
    return macs


def _linear_macs(config: ModelConfig, specs: Sequence[TensorSpec], positions: int) -> Counter[str]:
    """A token is multiplied with every matrix once, but with K experts, and with h_proj for each of N streams."""
    macs = Counter[str]()
    for spec in specs:
        if spec.kind == "matrix" or spec.group == "head":
            streams = config.hc_mult if spec.name.endswith("h_proj.weight") else 1
            times = config.num_experts_per_tok if spec.group == "experts" else streams
            macs[spec.group] += positions * spec.size * times
    return macs


def _attention_macs(config: ModelConfig, ratios: Sequence[int], positions: int, mode: AttentionMode) -> Counter[str]:
    """Scores q . k and weighted sums of the H heads, K = V one vector of C channels (R eq. 27)."""
    pair = 2 * config.num_attention_heads * config.head_dim
    macs = Counter[str]()
    for ratio in ratios:
        macs["window_attention"] += pair * window_pairs(positions, config.sliding_window)
        if ratio == CSA_RATIO:
            limit = config.index_topk if mode == "sparse" else None
            macs["csa_attention"] += pair * block_pairs(positions, ratio, limit)
        elif ratio:
            macs["hca_attention"] += pair * block_pairs(positions, ratio)
    return macs


def _stream_macs(config: ModelConfig, blocks: int) -> int:
    """mHC per token: each of two sites per block collapses [1, N] [N, D] and carries [N, N] [N, D]; a last collapse."""
    N, D = config.hc_mult, config.hidden_size
    return N * D * (blocks * 2 * (1 + N) + 1)


def _indexer_flops(config: ModelConfig, positions: int, mode: AttentionMode) -> dict[str, int]:
    """The indexer and its KL loss over one row: its linear maps, and the scores I_ts = sum_h w_th relu(q_th . k_s)."""
    linear, pair = _indexer_macs(config)
    scored = block_pairs(positions, CSA_RATIO)
    learned = block_pairs(positions, CSA_RATIO, config.index_topk) if mode == "sparse" else scored
    return {
        "indexer": FLOP_PER_MAC * DETACHED * positions * linear,
        "indexer_scores": FLOP_PER_MAC * pair * (FORWARD * scored + (TRAINED - FORWARD) * learned),
    }


def _passes(macs: int, mode: AttentionMode) -> Passes:
    """Of products with a gradient to both factors; in the indexer's warm-up they run forward only."""
    again = 0 if mode == "indexer_warmup" else TRAINED - FORWARD
    return Passes(forward=FLOP_PER_MAC * FORWARD * macs, backward=FLOP_PER_MAC * again * macs)


def _indexer_passes(config: ModelConfig, positions: int, mode: AttentionMode) -> Passes:
    """Of one layer's indexer; all are alike."""
    flops = _indexer_flops(config, positions, mode)
    linear, pair = _indexer_macs(config)
    forward = FLOP_PER_MAC * FORWARD * (positions * linear + pair * block_pairs(positions, CSA_RATIO))
    layers = max(1, config.attention_ratios.count(CSA_RATIO))
    return Passes(forward=forward // layers, backward=(sum(flops.values()) - forward) // layers)


def _indexer_macs(config: ModelConfig) -> tuple[int, int]:
    """Multiply-adds of all indexers per token in linear maps, and per query-block pair in scores."""
    specs = released_tensors(config, experts=1)
    linear = sum(spec.size for spec in specs if spec.group == "indexer" and spec.kind == "matrix")
    return linear, config.attention_ratios.count(CSA_RATIO) * config.index_n_heads * (config.index_head_dim + 1)
