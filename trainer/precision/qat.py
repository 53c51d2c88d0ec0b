"""FP4 on its way through FP8: which tiles the cast changes, which it cannot; the rotation before FP4 of q and k.

Source: R 5.2.1, spec 7.3. A weight rounded to E2M1 with scales 2^s per 1x32 is cast to E4M3 with one scale 2^t per
128x128, t from the tile's largest number. Of the sub-block with the largest scale s - t is 6, for 6 * 2^6 = 384 is not
above 448, or more where it has no 6. Each number of E2M1 times 2^k is one of E4M3 for k = -8 ... 6: half of 2^-8 is
E4M3's smallest number. So no number changes where the scales of a tile are within 2^14 of each other; beyond, odd
multiples of 0.5 may.
"""

import torch
from torch import Tensor

from model.layers import at_least_fp32
from trainer.precision.elements import E2M1_1X32, E4M3_OF_FP4, Format
from trainer.precision.formats import NAN_EXPONENT, Coded, block_amax, rounded

LOSSLESS_LOG2 = 14
"""Of the ratio of a tile's largest to its smallest scale."""


@torch.no_grad()
def inexact_tiles(x: Tensor, format: Format = E4M3_OF_FP4) -> int:
    """How many blocks of `format` have a number that rounding to it changes; those with a NaN count.

    x: [..., rows, columns], rounded to E2M1_1X32 before.
    """
    changed = (rounded(x, format) != x).to(torch.float32)
    return int(block_amax(changed, format.block).sum())


@torch.no_grad()
def lossless_by_scales(coded: Coded, format: Format = E2M1_1X32, tile: tuple[int, int] = E4M3_OF_FP4.block) -> Tensor:
    """By tile, bool: whether its scales alone say that the cast to E4M3 changes nothing.

    coded: in `format`, whose blocks are parts of tiles. Sub-blocks of zeros do not count, whatever their scale. True is
    a proof; False is none that a number changes, but for a sub-block of the smallest scale with an odd multiple of 0.5.
    """
    assert tile[0] % format.block[0] == 0
    assert tile[1] % format.block[1] == 0
    size = (coded.codes & 7).to(torch.float32)
    present = block_amax(size, format.block) > 0
    exponent, beyond = coded.exponents.to(torch.float32), float(NAN_EXPONENT + 1)
    blocks = tile[0] // format.block[0], tile[1] // format.block[1]
    # 1 + the largest and 256 - the smallest; both 0 in a tile of zeros.
    largest = block_amax(torch.where(present, exponent + 1, 0), blocks)
    smallest = block_amax(torch.where(present, beyond - exponent, 0), blocks)
    return (largest + smallest - (beyond + 1) <= LOSSLESS_LOG2) & (largest <= NAN_EXPONENT)


def hadamard(x: Tensor) -> Tensor:
    """x H / sqrt(n) over the last dim, n a power of two, H = [[H', H'], [H', -H']] (Sylvester's order).

    Symmetric and its own inverse. At least in fp32, rounded to x's type once; sums are of two, in a fixed order. It
    spreads one large channel over all, so that FP4 loses less (R 5.2.1). Raises ValueError for another n.
    """
    n = x.shape[-1]
    if n & (n - 1) or not n:
        raise ValueError(f"channels = {n}: expected a power of two, for the Hadamard rotation")
    y, distance = at_least_fp32(x), 1
    while distance < n:
        low, high = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        distance *= 2
    return (y * n**-0.5).to(x.dtype)
