"""The sum of gradients over rows, the same bits in any order: int64 fixed point with 48 fractional bits.

A leaf is rounded once to a multiple of 2^-48, to nearest even; from there on the sum is exact, so it does not matter
who computed which row, nor in what order they arrive.
"""

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

FRACTION_BITS = 48
LIMIT = 2.0**14
"""Largest sum of the leaves' largest elements: below it no element of the sum can overflow."""
CHUNK = 1 << 16
"""Elements converted at a time, so that the intermediate values stay in the cache."""


class ExactSum:
    """Order-free sums of leaves by name."""

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of the leaves as they are rounded and of the result, fp32 or fp64."""
        self._dtype = dtype
        self._lock = threading.Lock()
        self._sums = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}
        self._largest = dict.fromkeys(shapes, 0.0)

    def reset(self) -> None:
        """Start a new sum."""
        for name, total in self._sums.items():
            if self._largest[name]:
                total.zero_()
                self._largest[name] = 0.0

    @torch.no_grad()
    def add(self, name: str, leaf: Tensor) -> None:
        """Add one leaf; threads may call it at the same time.

        Raises FloatingPointError if it is not finite, OverflowError if the sum could overflow.
        """
        total = self._sums[name]
        assert leaf.shape == total.shape, (name, leaf.shape, total.shape)
        if leaf.numel() == 0:
            return
        largest = float(torch.linalg.vector_norm(leaf, torch.inf))
        if not largest < torch.inf:
            raise FloatingPointError(f"gradient {name}: expected finite values, found {largest}")
        with self._lock:
            self._add(name, leaf, total, largest)

    def _add(self, name: str, leaf: Tensor, total: Tensor, largest: float) -> None:
        self._largest[name] += largest
        if self._largest[name] >= LIMIT:
            raise OverflowError(
                f"gradient {name} = {largest:g}: expected elements whose sum stays below {LIMIT:g} (exact sums)"
            )
        for part, summed in zip(leaf.contiguous().view(-1).split(CHUNK), total.view(-1).split(CHUNK), strict=True):
            # Scaling by a power of two is exact, so the one rounding is round_.
            summed.add_(part.to(self._dtype).mul(2.0**FRACTION_BITS).round_().to(torch.int64))

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The sums so far, rounded once to the result's type."""
        return {
            name: total.to(torch.float64).mul_(2.0**-FRACTION_BITS).to(self._dtype)
            for name, total in self._sums.items()
        }
