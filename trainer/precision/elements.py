"""What a format is: an element type, the block that shares a scale, the least amax of a block. No torch.

Source: spec 7.2; OCP Microscaling Formats 1.0 (E2M1), OCP 8-bit Floating Point 1.0 (E4M3).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from model.config import require

Element = Literal["e4m3", "e2m1"]
LARGEST: dict[Element, float] = {"e4m3": 448.0, "e2m1": 6.0}
FLOORS: dict[Element, float] = {"e4m3": 1e-4, "e2m1": 6 * 2.0**-126}
"""Floors of amax in DeepSeek's casts, so that blocks of noise do not become large codes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """An element type, the block (rows, columns of the last two dims) that shares a scale, and the least amax."""

    element: Element
    block: tuple[int, int]
    floor: float

    def __post_init__(self) -> None:
        require(self.element in LARGEST, "element", self.element, f"one of {', '.join(LARGEST)}")
        require(min(self.block) > 0, "block", self.block, "two positive numbers")
        require(self.floor >= 0, "floor", self.floor, "at least 0")

    @property
    def name(self) -> str:
        """As recipes write it: e4m3_1x128."""
        return f"{self.element}_{self.block[0]}x{self.block[1]}"

    @property
    def bits(self) -> float:
        """Bits per number, scales included."""
        return {"e4m3": 8, "e2m1": 4}[self.element] + 8 / (self.block[0] * self.block[1])


def named(name: str, floor: float | None = None) -> Format:
    """The format of a name like e4m3_128x128. floor: default DeepSeek's. Raises ValueError for any other name."""
    match = re.fullmatch(r"(e4m3|e2m1)_([1-9]\d*)x([1-9]\d*)", name)
    if match is None:
        raise ValueError(f"{name}: expected a format such as e4m3_1x128, e4m3_128x128 or e2m1_1x32")
    element: Element = "e4m3" if match[1] == "e4m3" else "e2m1"
    least = FLOORS[element] if floor is None else floor
    return Format(element=element, block=(int(match[2]), int(match[3])), floor=least)


E4M3_1X128, E4M3_128X1, E4M3_128X128, E2M1_1X32 = map(named, ("e4m3_1x128", "e4m3_128x1", "e4m3_128x128", "e2m1_1x32"))
E4M3_OF_FP4 = replace(E4M3_128X128, floor=0.0)
"""What FP4 weights are cast to: with a floor, blocks of small numbers would lose some."""


def coded_shapes(shape: Sequence[int], format: Format) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the bytes of a matrix's codes, E2M1 two per byte, and of its scales."""
    rows, columns = shape
    width = -(-columns // 2) if format.element == "e2m1" else columns
    return (rows, width), (-(-rows // format.block[0]), -(-columns // format.block[1]))


def coded_bytes(shape: Sequence[int], format: Format) -> int:
    """Bytes of a matrix as codes and scales."""
    return sum(map(math.prod, coded_shapes(shape, format)))
