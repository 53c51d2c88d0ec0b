"""What one decoded token costs Keel, and how large its cache is, from the configuration alone: integers, no torch.

The same convention as `model.count`: matrix products only, two FLOP per multiply-add. How V4 is compared with V3.2 in
the formats it is served in: `model.efficiency`.
"""

from dataclasses import dataclass

from model.config import CSA_RATIO, AttentionMode, ModelConfig
from model.count import FLOP_PER_MAC, forward_macs

FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBytes:
    """Bytes of one row's cache by part; see `model.cache` for what the parts are."""

    window: int
    entries: int
    index_keys: int
    tails: int

    @property
    def total(self) -> int:
        return self.window + self.entries + self.index_keys + self.tails


def decode_flops(config: ModelConfig, context: int, mode: AttentionMode) -> dict[str, int]:
    """FLOP by part of the token that makes its row `context` tokens long: what a row costs more than one shorter."""
    longer, shorter = (forward_macs(config, positions, mode) for positions in (context, context - 1))
    return {part: FLOP_PER_MAC * (macs - shorter[part]) for part, macs in longer.items()}


def cache_bytes(config: ModelConfig, limit: int, mode: AttentionMode, element_bytes: int) -> CacheBytes:
    """Bytes of one row of `model.cache.Cache` for up to `limit` tokens of `element_bytes`-wide numbers, by part.

    Per layer: W C elements of window; floor(limit / m) entries of C; a tail of m tokens, each a value and a logit of C
    channels, with overlap of 2 C, and C more for the block before. The indexer of a CSA layer the same with J for C.
    Tails are at least fp32.
    """
    C, J, tail_bytes = config.head_dim, config.index_head_dim, max(element_bytes, FP32_BYTES)
    indexed = config.attention_ratios.count(CSA_RATIO) if mode == "sparse" else 0
    compressed = [ratio for ratio in config.attention_ratios if ratio]
    tail = (
        sum(ratio * _tail_width(ratio) * C for ratio in compressed) + indexed * CSA_RATIO * _tail_width(CSA_RATIO) * J
    )
    return CacheBytes(
        window=config.num_hidden_layers * config.sliding_window * C * element_bytes,
        entries=sum(limit // ratio for ratio in compressed) * C * element_bytes,
        index_keys=indexed * (limit // CSA_RATIO) * J * element_bytes,
        tails=tail * tail_bytes,
    )


def _tail_width(ratio: int) -> int:
    """Numbers that a compressor's tail keeps per token of a block, in units of the entry's channels."""
    return 2 * 3 if ratio == CSA_RATIO else 2
