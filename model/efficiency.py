"""The efficiency claim by count: a decoded token's FLOP and the cache of V4 and of V3.2, as they are served.

The report (R 1) gives 27 % of V3.2's FLOP and 10 % of its cache for Pro at 1M tokens, 10 % and 7 % for Flash, without a
counting convention. This one gives 26.7 % and 10.5 %, 10.1 % and 7.3 % (spec 9):

- FLOP are FP8 equivalents, two per multiply-add: BF16 and fp32 products count twice, FP4 by FP4 (V4's index scores)
  half, FP4 weights as FP8, at whose rate they run today (report). Formats of weights: those of the released checkpoint.
  Attention is BF16. V3.2's heads all read one latent as key and value; its index scores are FP8.
- Counted: linear maps, index scores q . k, attention scores and weighted sums. Not counted: the weighted sum over index
  heads, mHC's mixing of streams, everything elementwise, MTP.
- A V4 entry: one FP8 byte per channel, but BF16 for RoPE channels; a scale byte per 64 FP8 channels; padded to 8 bytes.
  An index key: FP4, a scale byte per 32. Windows hold entries; the compressors' tails are fp32 (`model.cache`).
"""

from dataclasses import dataclass

from model import deepseek_v32 as v32
from model.config import CSA_RATIO, ModelConfig
from model.count_decode import FP32_BYTES, cache_bytes
from model.inventory import released_tensors

FP4_FLOP, FP8_FLOP, BF16_FLOP = 1, 2, 4
"""FP8 equivalents per multiply-add."""
CONTEXTS = (4096, 16384, 65536, 262144, 1048576)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of decoding the last token of a row of `context` tokens: FP8-equivalent FLOP, and bytes of the row's cache."""

    context: int
    linear_flops: int
    index_flops: int
    attention_flops: int
    cache_bytes: int

    @property
    def flops(self) -> int:
        return self.linear_flops + self.index_flops + self.attention_flops


def contexts(config: ModelConfig) -> tuple[int, ...]:
    """The lengths to print for a model: those of CONTEXTS that it can have, else its longest row."""
    longest = config.max_position_embeddings
    return tuple(context for context in CONTEXTS if context <= longest) or (longest,)


def v4_cost(config: ModelConfig, context: int) -> Cost:
    """A V4 model in the sparse mode."""
    ratios = config.attention_ratios
    indexed = ratios.count(CSA_RATIO)
    keys = len(ratios) * min(context, config.sliding_window)
    keys += sum(_visible(config, ratio, context) for ratio in ratios if ratio)
    return Cost(
        context=context,
        linear_flops=_linear_flops(config),
        index_flops=FP4_FLOP * indexed * (context // CSA_RATIO) * config.index_n_heads * config.index_head_dim,
        attention_flops=BF16_FLOP * keys * config.num_attention_heads * 2 * config.head_dim,
        cache_bytes=_cache_bytes(config, context),
    )


def v32_cost(context: int) -> Cost:
    """DeepSeek-V3.2."""
    attended = v32.LAYERS * min(context, v32.INDEX_TOPK) * v32.HEADS
    return Cost(
        context=context,
        linear_flops=_v32_linear_flops(),
        index_flops=FP8_FLOP * v32.LAYERS * context * v32.INDEX_HEADS * v32.INDEX_CHANNELS,
        attention_flops=BF16_FLOP * attended * (v32.KV_RANK + v32.ROPE_CHANNELS + v32.KV_RANK),
        cache_bytes=v32.LAYERS * context * (v32.LATENT_BYTES + v32.INDEX_KEY_BYTES),
    )


def entry_bytes(config: ModelConfig) -> int:
    """One key-value entry as served: 584 bytes for Flash and Pro."""
    still, turned = config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim
    return _ceil(still + _ceil(still, 64) + 2 * turned, 8) * 8


def index_key_bytes(config: ModelConfig) -> int:
    """One index key as served: 68 bytes for Flash and Pro."""
    return _ceil(config.index_head_dim, 2) + _ceil(config.index_head_dim, 32)


def _linear_flops(config: ModelConfig) -> int:
    """Every matrix once, of the experts the chosen ones; the embedding is looked up."""
    total = 0
    for spec in released_tensors(config, experts=1):
        if spec.is_mtp or not (spec.kind == "matrix" or spec.group == "head"):
            continue
        times = config.num_experts_per_tok if spec.group == "experts" else 1
        total += spec.size * times * (FP8_FLOP if spec.stored in ("F8_E4M3", "FP4") else BF16_FLOP)
    return total


def _visible(config: ModelConfig, ratio: int, context: int) -> int:
    """Entries that the last token of a row attends to in a layer of this rate."""
    return min(context // ratio, config.index_topk) if ratio == CSA_RATIO else context // ratio


def _cache_bytes(config: ModelConfig, context: int) -> int:
    ratios = config.attention_ratios
    entries = len(ratios) * config.sliding_window + sum(context // ratio for ratio in ratios if ratio)
    keys = ratios.count(CSA_RATIO) * (context // CSA_RATIO)
    tails = cache_bytes(config, context, "sparse", FP32_BYTES).tails
    return entries * entry_bytes(config) + keys * index_key_bytes(config) + tails


def _v32_linear_flops() -> int:
    D, H = v32.HIDDEN, v32.HEADS
    queries = D * v32.Q_RANK + v32.Q_RANK * H * (v32.HEAD_CHANNELS + v32.ROPE_CHANNELS)
    latents = D * (v32.KV_RANK + v32.ROPE_CHANNELS) + v32.KV_RANK * H * 2 * v32.HEAD_CHANNELS
    attention = queries + latents + H * v32.HEAD_CHANNELS * D
    indexer = v32.Q_RANK * v32.INDEX_HEADS * v32.INDEX_CHANNELS + D * v32.INDEX_CHANNELS
    experts = (v32.CHOSEN_EXPERTS + v32.SHARED_EXPERTS) * 3 * D * v32.EXPERT_INTERMEDIATE
    sparse = v32.LAYERS - v32.DENSE_LAYERS
    fp8 = v32.LAYERS * (attention + indexer) + sparse * experts + v32.DENSE_LAYERS * 3 * D * v32.DENSE_INTERMEDIATE
    bf16 = v32.VOCABULARY * D + sparse * v32.EXPERTS * D + v32.LAYERS * v32.INDEX_HEADS * D
    return FP8_FLOP * fp8 + BF16_FLOP * bf16


def _ceil(length: int, block: int) -> int:
    return -(-length // block)
