"""Oracle: E4M3 and E2M1 numbers with power-of-two scales, number by number, in Python's own floats.

Source: OCP 8-bit Floating Point 1.0 (E4M3), OCP Microscaling Formats 1.0 (E2M1, E8M0), fact sheet section 7.2. Every
step is exact in fp64: a power of two times an fp32 number, halves of sums of neighbours, comparisons.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

Rows = Sequence[Sequence[float]]

ELEMENTS = {"e4m3": (4, 3), "e2m1": (2, 1)}
"""Bits of exponent and mantissa; the sign stands before them. The bias is half of the exponent's range."""
FLOORS = {"e4m3": 1e-4, "e2m1": 6 * 2.0**-126}
NAN_EXPONENT = 255


def number(code: int, element: str) -> float:
    """What a code means: (-1)^sign 2^(exponent - bias) 1.mantissa, below the normal numbers 2^(1 - bias) 0.mantissa."""
    exponent_bits, mantissa_bits = ELEMENTS[element]
    sign = code >> (exponent_bits + mantissa_bits)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    if element == "e4m3" and (exponent, mantissa) == (15, 7):
        return math.nan
    bias = (1 << (exponent_bits - 1)) - 1
    fraction = mantissa / (1 << mantissa_bits)
    size = 2.0 ** (exponent - bias) * (1 + fraction) if exponent else 2.0 ** (1 - bias) * fraction
    return -size if sign else size


@cache
def numbers(element: str) -> tuple[float, ...]:
    """The numbers from 0 on, ascending, by code; NaN left out."""
    half = 1 << (sum(ELEMENTS[element]))
    return tuple(size for size in (number(code, element) for code in range(half)) if not math.isnan(size))


@cache
def middles(element: str) -> tuple[float, ...]:
    """Halfway between each number and the next."""
    sizes = numbers(element)
    return tuple((low + high) / 2 for low, high in pairwise(sizes))


def nearest(value: float, element: str) -> int:
    """The code of the number nearest to a finite value; of two as near, the even code; the largest for all beyond."""
    size = abs(value)
    code = bisect_left(middles(element), size)
    if code < len(middles(element)) and size == middles(element)[code] and code % 2:
        code += 1
    negative = math.copysign(1.0, value) < 0
    return code + (1 << sum(ELEMENTS[element])) if negative else code


def exponent(amax: float, element: str, floor: float) -> int:
    """The E8M0 of a block: the least e in 0 ... 254 with largest * 2^(e - 127) >= max(amax, floor)."""
    if not math.isfinite(amax):
        return NAN_EXPONENT
    e = 0
    while numbers(element)[-1] * 2.0 ** (e - 127) < max(amax, floor):
        e += 1
    return e


def encode(rows: Rows, element: str, block: tuple[int, int], floor: float) -> tuple[list[list[int]], list[list[int]]]:
    """Codes of all numbers and exponents of all blocks; blocks at the borders may be cut."""
    height, width = len(rows), len(rows[0])
    codes = [[0] * width for _ in range(height)]
    exponents = []
    for top in range(0, height, block[0]):
        exponents.append([])
        for left in range(0, width, block[1]):
            places = [
                (i, j)
                for i in range(top, min(top + block[0], height))
                for j in range(left, min(left + block[1], width))
            ]
            sizes = [abs(rows[i][j]) for i, j in places]
            amax = math.inf if any(math.isnan(size) for size in sizes) else max(sizes)
            exponents[-1].append(exponent(amax, element, floor))
            for i, j in places:
                codes[i][j] = _code(rows[i][j], exponents[-1][-1], element)
    return codes, exponents


def decode(
    codes: Sequence[Sequence[int]], exponents: Sequence[Sequence[int]], element: str, block: tuple[int, int]
) -> Rows:
    """The numbers of codes with their scales."""
    return [
        [
            math.nan
            if (e := exponents[i // block[0]][j // block[1]]) == NAN_EXPONENT
            else number(code, element) * 2.0 ** (e - 127)
            for j, code in enumerate(row)
        ]
        for i, row in enumerate(codes)
    ]


def _code(value: float, e: int, element: str) -> int:
    if e == NAN_EXPONENT:
        return (2 << sum(ELEMENTS[element])) - 1  # ones only
    return nearest(value / 2.0 ** (e - 127), element)
