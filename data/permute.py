"""A keyed permutation of range(n), computed per index: no index array, any position in constant time.

A Feistel network over the next even power of two, walked until it falls inside the range (cycle walking).
"""

import hashlib
from dataclasses import dataclass

import numpy as np

ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd: consecutive multiples spread evenly (the increment of splitmix64)."""
MIX_FIRST = 0xBF58476D1CE4E5B9
MIX_SECOND = 0x94D049BB133111EB
"""Multipliers of the splitmix64 finaliser."""
LARGEST = 2**62
WORD = 2**64 - 1


def derive_key(*parts: int | str) -> int:
    """Return a 64-bit key that depends on every part (its value, its type and its place) and on nothing else."""
    text = repr(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True, slots=True)
class Permutation:
    """The permutation of range(size) that `key` names."""

    size: int
    key: int

    def __post_init__(self) -> None:
        assert 0 < self.size <= LARGEST

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Return where each index goes: int64 in, int64 out, same shape; every index must lie in range(size)."""
        assert index.size == 0 or (index.min() >= 0 and index.max() < self.size)
        half_bits = max(1, ((self.size - 1).bit_length() + 1) // 2)
        round_keys = [(self.key + i * GOLDEN) & WORD for i in range(ROUNDS)]
        value = index.astype(np.uint64)
        outside = np.ones(value.shape, bool)
        while outside.any():
            value[outside] = _feistel(value[outside], half_bits, round_keys)
            outside = value >= np.uint64(self.size)
        return value.astype(np.int64)


def _feistel(value: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> half, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right + np.uint64(key)) & mask)
    return (left << half) | right


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(MIX_FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(MIX_SECOND)
    return value ^ (value >> np.uint64(31))
