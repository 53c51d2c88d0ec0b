"""E4M3 and E2M1 with one power-of-two scale (E8M0) for each block: encode, decode, pack. On any device, bit by bit.

Source: OCP Microscaling Formats 1.0 (E8M0), the released code's casts (spec 7.2): scale = 2^ceil(log2(max(amax, floor)
/ largest)), by the bits of amax, never by a logarithm; then round to nearest, ties to even. All in fp32: fp64 is
rounded to fp32 first, bf16 is exact in it.

No finite number saturates: the scale follows the largest of its block. A block with an infinity or a NaN has the scale
E8M0 calls NaN (255) and codes of ones only, so that all of it decodes to NaN: it is seen in the next loss, and nothing
is silently cut off.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.precision.elements import LARGEST, Element, Format

NAN_EXPONENT = 255
"""E8M0's NaN."""
BIAS = 127
MANTISSA_BITS = 23
MANTISSA = (1 << MANTISSA_BITS) - 1
SIZE = (1 << 31) - 1
"""All bits of a number but its sign."""
ONE, SIX = 0x3F800000, 0x40C00000
"""Bits of 1 and 6 in fp32."""
SIGN_E2M1 = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """codes: uint8, one per number, in the shape of the numbers; E2M1 in the low four bits, the sign highest. Those of
    `encode` lie row by row, however the numbers do.

    exponents: uint8, one per block, [..., ceil(rows / block), ceil(columns / block)]: the scale is 2^(e - 127).
    """

    codes: Tensor
    exponents: Tensor


def encode(x: Tensor, format: Format) -> Coded:
    """Codes and scales of x [..., rows, columns]; x of one dim is one row. Blocks at the borders may be cut."""
    x = x.detach().float().contiguous()
    return _encode_at(x, format, exponents(x, format))


def encode_at(x: Tensor, format: Format, exponent: Tensor) -> Coded:
    """`encode` with these scales; a finite number too large for its own saturates."""
    x = x.detach().float().contiguous()
    return _encode_at(x, format, torch.where(block_amax(x, format.block).isfinite(), exponent, NAN_EXPONENT))


def decode(coded: Coded, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of codes; exact in fp32, and in bf16 but for those below its normal ones (2^-126).

    What was rounded up to 2^128, from 1.75 * 2^127 on, is infinite.
    """
    exact = dtype if dtype == torch.bfloat16 else torch.float32
    table = _table(format.element, exact, coded.codes.device)
    flat = table.index_select(0, coded.codes.flatten().int()).view(coded.codes.shape)
    return _scaled(flat, scales(coded.exponents).to(exact), format.block).to(dtype)


def rounded(x: Tensor, format: Format) -> Tensor:
    """x as its codes have it, in x's type: decode(encode(x)). Doing it twice changes nothing more."""
    return decode(encode(x, format), format, x.dtype)


def exponents(x: Tensor, format: Format) -> Tensor:
    """The scale of each block of x, 2^ceil(log2(max(amax, floor) / largest)), as E8M0; NaN where amax is not finite."""
    amax = block_amax(x, format.block)
    bits = amax.clamp_min(format.floor).view(torch.int32)
    # Divided by the largest = m 2^k: the exponent less k, and one more where amax has the larger mantissa.
    largest = torch.tensor(LARGEST[format.element]).view(torch.int32).item()
    k, mantissa = (int(largest) >> MANTISSA_BITS) - BIAS, int(largest) & MANTISSA
    exponent = ((bits + (MANTISSA - mantissa)) >> MANTISSA_BITS) - k
    return torch.where(amax.isfinite(), exponent.clamp_min(0), NAN_EXPONENT).to(torch.uint8)


def scales(exponent: Tensor) -> Tensor:
    """2^(e - 127) in fp32; NaN for 255."""
    bits = exponent.to(torch.int32) << MANTISSA_BITS
    # 2^-127 is below the normal numbers; an exponent of 255 must have a mantissa to be a NaN.
    smallest, quiet = 1 << (MANTISSA_BITS - 1), (NAN_EXPONENT << MANTISSA_BITS) | (1 << (MANTISSA_BITS - 1))
    bits = torch.where(exponent == 0, smallest, torch.where(exponent == NAN_EXPONENT, quiet, bits))
    return bits.to(torch.int32).view(torch.float32)


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block, fp32; NaN where there is one."""
    return _blocks(x.float(), block).abs().amax((-3, -1))


def scaled(x: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """x times the scale of its block, fp32."""
    return _scaled(x.float(), scale, block)


def pack(codes: Tensor) -> Tensor:
    """E2M1 codes two per byte along the last dim, [..., ceil(columns / 2)]: the even column in the low nibble."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The codes of `pack`, [..., columns]. packed: bytes, uint8 or int8."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :columns]


def _encode_at(x: Tensor, format: Format, exponent: Tensor) -> Coded:
    inverse = (2 * BIAS - exponent.int()).clamp_min(0).to(torch.uint8)
    blocks = _blocks(x, format.block) * _spread(scales(inverse))
    ones = torch.where(exponent == NAN_EXPONENT, -1, 0).int()
    blocks.view(torch.int32).bitwise_or_(_spread(ones))
    value = _joined(blocks, x.shape)
    return Coded(codes=_e4m3(value) if format.element == "e4m3" else _e2m1(value), exponents=exponent)


def _e4m3(value: Tensor) -> Tensor:
    """Codes; the values are lost. What is larger than 448 saturates, which torch's cast does not in all releases."""
    largest = LARGEST["e4m3"]
    return value.clamp_(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)


def _e2m1(value: Tensor) -> Tensor:
    """Codes; what is larger than 6 saturates. By integers, for torch has no such cast.

    Numbers are multiples of 0.5 below 2, of 1 below 4, of 2 from there on: half the power of two 2^e <= size, e >= 0.
    Adding 2^(e + 22), an fp32 number with such a last digit, rounds to it, ties to even. The sum's last bits are then
    the number q of these steps and its exponent field is e + 149; the code is q + 2 e.
    """
    bits = value.view(torch.int32)
    size = (bits & SIZE).clamp_(max=SIX)
    power = (size & ~MANTISSA).clamp_(min=ONE).add_(22 << MANTISSA_BITS)
    total = size.view(torch.float32).add(power.view(torch.float32)).view(torch.int32)
    code = (total >> (MANTISSA_BITS - 1)).add_(total).sub_(2 * 149)
    return code.bitwise_or_((bits >> 28).bitwise_and_(SIGN_E2M1)).to(torch.uint8)


@cache
def _table(element: Element, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The number of each code."""
    if element == "e4m3":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype).to(device)
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=dtype)
    return torch.cat((positive, -positive)).to(device)


def _scaled(x: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    return _joined(_blocks(x, block) * _spread(scale), x.shape)


def _spread(of_blocks: Tensor) -> Tensor:
    """One number per block, in the dims of `_blocks`."""
    return of_blocks.unsqueeze(-2).unsqueeze(-1)


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., rows / r, r, columns / c, c], filled up with zeros."""
    x = x.unsqueeze(0) if x.dim() == 1 else x
    rows, columns = x.shape[-2:]
    if rows % block[0] or columns % block[1]:
        x = F.pad(x, (0, -columns % block[1], 0, -rows % block[0]))
    return x.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))


def _joined(blocks: Tensor, shape: torch.Size) -> Tensor:
    """What `_blocks` cut, without what it filled up."""
    x = blocks.flatten(-4, -3).flatten(-2)
    rows, columns = (1, *shape)[-2:]
    return x[..., :rows, :columns].reshape(shape)
