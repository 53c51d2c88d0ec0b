"""The part of `keel plan` about decoding: FLOP and cache of a token, and their shares of DeepSeek-V3.2's."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.plan import Decoding

NOTES = (
    "as served; FLOP in FP8 equivalents: BF16 counts 2, FP4 x FP4 (index scores) 1/2, FP4 weights 1; products only",
    "cache: FP8 entries with BF16 RoPE channels, FP4 index keys, windows and fp32 tails; bytes are of the whole row",
)


def rows(decoding: Sequence["Decoding"], dtype: str) -> list[Sequence[str]]:
    """A column for each context."""
    costs = [(one.cost, one.reference) for one in decoding]
    flops = {
        "linear maps": [cost.linear_flops for cost, _ in costs],
        "index scores": [cost.index_flops for cost, _ in costs],
        "attention": [cost.attention_flops for cost, _ in costs],
        "total": [cost.flops for cost, _ in costs],
    }
    size, unit = (1e9, "GFLOP") if max(flops["total"]) >= 1e9 else (1e6, "MFLOP")
    return [
        (f"decode, {unit} at context", *(_context(cost.context) for cost, _ in costs)),
        *((part, *(f"{value / size:.2f}" for value in values)) for part, values in flops.items()),
        ("of DeepSeek-V3.2's", *(_share(cost.flops, reference.flops) for cost, reference in costs)),
        ("cache bytes per position", *(f"{cost.cache_bytes / cost.context:,.0f}" for cost, _ in costs)),
        ("cache bytes", *(f"{cost.cache_bytes:,}" for cost, _ in costs)),
        ("of DeepSeek-V3.2's", *(_share(cost.cache_bytes, reference.cache_bytes) for cost, reference in costs)),
        (f"Keel's own cache, {dtype}", *(f"{one.own_cache_bytes:,}" for one in decoding)),
    ]


def as_json(decoding: "Decoding") -> dict[str, Any]:
    """One context's numbers, exact, and the two shares."""
    cost, reference = decoding.cost, decoding.reference
    return {
        **asdict(cost),
        "flops": cost.flops,
        "v32_flops": reference.flops,
        "v32_cache_bytes": reference.cache_bytes,
        "share_of_v32_flops": cost.flops / reference.flops,
        "share_of_v32_cache": cost.cache_bytes / reference.cache_bytes,
        "own_cache_bytes": decoding.own_cache_bytes,
    }


def _context(tokens: int) -> str:
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens}"


def _share(ours: int, theirs: int) -> str:
    percent = 100 * ours / theirs
    return f"{percent:.1f} %" if percent >= 0.1 else f"{percent:.2g} %"
