"""E4M3 and E2M1 with one power-of-two scale (E8M0) for each block: encode, decode, pack. On any device, bit by bit.

Source: OCP Microscaling Formats 1.0 (E8M0), the released code's casts (spec 7.2): scale = 2^ceil(log2(max(amax, floor)
/ largest)), by the bits of amax, never by a logarithm; then round to nearest, ties to even. All in fp32: fp64 is
rounded to fp32 first, bf16 is exact in it.

No finite number saturates: the scale follows the largest of its block. A block with an infinity or a NaN has the scale
E8M0 calls NaN (255), so that all of it decodes to NaN: it is seen in the next loss, and nothing is silently cut off.
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
SIGN_E2M1 = 8
SIGN_E4M3 = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """codes: uint8, one per number, in the shape of the numbers; E2M1 in the low four bits, the sign highest.

    exponents: uint8, one per block, [..., ceil(rows / block), ceil(columns / block)]: the scale is 2^(e - 127).
    """

    codes: Tensor
    exponents: Tensor


def encode(x: Tensor, format: Format) -> Coded:
    """Codes and scales of x [..., rows, columns]; x of one dim is one row. Blocks at the borders may be cut."""
    return _encode_at(x, format, exponents(x, format))


def encode_at(x: Tensor, format: Format, exponent: Tensor) -> Coded:
    """`encode` with these scales; what is too large for one saturates."""
    return _encode_at(x, format, exponent)


def decode(coded: Coded, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of codes; exact in fp32 and, while their exponents are bf16's, in bf16."""
    table = _table(format.element, coded.codes.device)
    flat = table.index_select(0, coded.codes.flatten().int()).view(coded.codes.shape)
    return scaled(flat, scales(coded.exponents), format.block).to(dtype)


def rounded(x: Tensor, format: Format) -> Tensor:
    """x as its codes have it, in x's type: decode(encode(x)). Doing it twice changes nothing more."""
    return decode(encode(x, format), format, x.dtype)


def exponents(x: Tensor, format: Format) -> Tensor:
    """The scale of each block of x, as E8M0."""
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
    return _blocks(x.to(torch.float32) if x.dtype == torch.float64 else x, block).abs().amax((-3, -1)).float()


def scaled(x: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """x times the scale of its block, fp32."""
    blocks = _blocks(x.float(), block) * scale.unsqueeze(-2).unsqueeze(-1)
    return _joined(blocks, x.shape)


def pack(codes: Tensor) -> Tensor:
    """E2M1 codes two per byte along the last dim, [..., ceil(columns / 2)]: the even column in the low nibble."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The codes of `pack`, [..., columns]. packed: bytes, uint8 or int8."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :columns]


def _encode_at(x: Tensor, format: Format, exponent: Tensor) -> Coded:
    inverse = torch.where(exponent == NAN_EXPONENT, NAN_EXPONENT, 2 * BIAS - exponent.int()).to(torch.uint8)
    value = scaled(x, scales(inverse), format.block)
    largest = LARGEST[format.element]
    value = value.clamp(-largest, largest)  # some releases of torch cast what is larger to NaN
    codes = value.to(torch.float8_e4m3fn).view(torch.uint8) if format.element == "e4m3" else _e2m1(value)
    return Coded(codes=codes, exponents=exponent)


def _e2m1(value: Tensor) -> Tensor:
    """Codes of numbers of at most 6: steps of 0.5 below 2, of 1 below 4, of 2 above; ties to even codes."""
    size = value.abs()
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.nan_to_num(0).to(torch.uint8) | (torch.signbit(value).to(torch.uint8) * SIGN_E2M1)


@cache
def _table(element: Element, device: torch.device) -> Tensor:
    """The number of each code."""
    if element == "e4m3":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return torch.cat((positive, -positive)).to(device)


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
