"""The casts of `trainer.precision.casts` by Triton kernels: the same codes and scales, each in one pass over memory.

Numbers are rounded by integers only, so that no flag of a compiler and no cast of a device decides a bit. A magnitude
is held as a key, which orders like it: the exponent field of fp32 above 23 bits of mantissa, with fields below 1 for
what fp32 holds as subnormal numbers. Infinities and NaN are INFINITE; a block with one has the scale NaN and codes of
ones.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.operand import operand
from trainer.precision.casts import FLOOR
from trainer.precision.formats import Coded

ROWS, COLUMNS = 16, 64
"""Rows of a program that casts along rows, columns of one that casts along columns; the other side is a block."""
BLOCK = 128

ZERO = tl.constexpr(-(200 << 23))
"""A key of 0, below all of other numbers."""
INFINITE = tl.constexpr(0x7F800000)
ONES = tl.constexpr(0x7FFFFF)
"""A mantissa of ones."""


@triton.jit
def _key(bits):
    """Of fp32 numbers, from their bits."""
    size = bits & 0x7FFFFFFF
    # A subnormal number is its mantissa times 2^-149, and a mantissa is an exact fp32 number. 0 is below all others.
    small = size.to(tl.float32).to(tl.int32, bitcast=True) - (149 << 23)
    key = tl.where(size <= ONES, small, size)
    return tl.minimum(key, INFINITE)


@triton.jit
def _key_of_code(code, exponent):
    """Of the numbers of E4M3 codes with their scales."""
    field = (code >> 3) & 15
    mantissa = tl.where(field > 0, (code & 7) | 8, code & 7)
    bits = mantissa.to(tl.float32).to(tl.int32, bitcast=True)
    field = (bits >> 23) + tl.maximum(field, 1) - 10 + exponent - 127
    finite = ((code & 127) != 127) & (exponent != 255) & (field < 255)
    key = (tl.minimum(field, 254) << 23) | (bits & ONES)
    return tl.where(finite, tl.where(mantissa == 0, ZERO, key), INFINITE)


@triton.jit
def _scale(amax, floor):
    """E8M0 of blocks with these largest keys: 2^ceil(log2(max(amax, floor) / 448)), 448 = 1.75 * 2^8."""
    exponent = ((tl.maximum(amax, floor) + (ONES - 0x600000)) >> 23) - 8
    return tl.where(amax == INFINITE, 255, tl.maximum(exponent, 0))


@triton.jit
def _code(key, negative, exponent):
    """E4M3 codes, nearest, ties to even; negative: 128 for numbers with a sign, else 0."""
    power = (key >> 23) - exponent
    # Four bits of the mantissa stay, fewer below 2^-6; from 25 on nothing does.
    cut = tl.minimum(20 + tl.maximum(-6 - power, 0), 26)
    mantissa = (key & ONES) | (ONES + 1)
    steps = (mantissa + (1 << (cut - 1)) - 1 + ((mantissa >> cut) & 1)) >> cut
    code = ((tl.maximum(power, -6) + 6) << 3) + steps
    return tl.where(exponent == 255, 255, code | negative).to(tl.uint8)


@triton.jit
def _store_rows(bits, codes_ptr, exponents_ptr, row, column, rows, floor, C: tl.constexpr, BLOCK: tl.constexpr):
    """Codes and scales of a tile of fp32 numbers, one block wide; 0 beyond the borders."""
    key = _key(bits)
    exponent = _scale(tl.max(key, 1), floor)
    code = _code(key, (bits >> 24) & 128, exponent[:, None])
    inside = (row < rows)[:, None] & (column < C)[None, :]
    tl.store(codes_ptr + row[:, None] * C + column[None, :], code, mask=inside)
    blocks = (C + BLOCK - 1) // BLOCK
    tl.store(exponents_ptr + row * blocks + tl.program_id(1), exponent.to(tl.uint8), mask=row < rows)


@triton.jit
def _cast_rows(
    x_ptr, codes_ptr, exponents_ptr, rows, floor, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
    _store_rows(x.to(tl.int32, bitcast=True), codes_ptr, exponents_ptr, row, column, rows, floor, C, BLOCK)


@triton.jit
def _swiglu_cast(
    gate_ptr, up_ptr, weight_ptr, codes_ptr, exponents_ptr, rows, limit, floor,
    C: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    place = row[:, None] * C + column[None, :]
    raw = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    # tl.minimum drops a NaN.
    gate = tl.where(raw > limit, limit, raw)
    raw = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.where(raw > limit, limit, tl.where(raw < -limit, -limit, raw))
    out = gate * tl.sigmoid(gate) * up
    if WEIGHT:
        out = out * tl.load(weight_ptr + row, mask=row < rows, other=0.0)[:, None]
    bits = out.to(tl.int32, bitcast=True)
    if gate_ptr.dtype.element_ty == tl.bfloat16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        bits = tl.where((bits & 0x7FFFFFFF) > INFINITE, bits, rounded)
    _store_rows(bits, codes_ptr, exponents_ptr, row, column, rows, floor, C, BLOCK)


@triton.jit
def _store_turned(
    key, negative, codes_ptr, exponents_ptr, row, column, rows, floor, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Codes and scales of a tile, one block high, the tile's columns as rows."""
    exponent = _scale(tl.max(key, 0), floor)
    code = tl.trans(_code(key, negative, exponent[None, :]))
    column = column.to(tl.int64)
    inside = (column < C)[:, None] & (row < rows)[None, :]
    tl.store(codes_ptr + column[:, None] * rows + row[None, :], code, mask=inside)
    blocks = (rows + BLOCK - 1) // BLOCK
    tl.store(exponents_ptr + column * blocks + tl.program_id(0), exponent.to(tl.uint8), mask=column < C)


@triton.jit
def _cast_columns(
    x_ptr, codes_ptr, exponents_ptr, rows, floor, C: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    _store_turned(_key(bits), (bits >> 24) & 128, codes_ptr, exponents_ptr, row, column, rows, floor, C, BLOCK)


@triton.jit
def _recast_columns(
    old_codes_ptr, old_exponents_ptr, codes_ptr, exponents_ptr, rows, floor,
    C: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    code = tl.load(old_codes_ptr + row[:, None] * C + column[None, :], mask=inside, other=0).to(tl.int32)
    blocks = (C + BLOCK - 1) // BLOCK
    place = row[:, None] * blocks + (column // BLOCK)[None, :]
    old = tl.load(old_exponents_ptr + place, mask=inside, other=0).to(tl.int32)
    _store_turned(_key_of_code(code, old), code & 128, codes_ptr, exponents_ptr, row, column, rows, floor, C, BLOCK)


def cast_rows(x_PC: Tensor, floor: float = FLOOR) -> Coded:
    """`trainer.precision.casts.cast_rows`: codes [P, C], exponents [P, ceil(C / 128)]."""
    x_PC = operand(x_PC)
    (rows, C), out = x_PC.shape, _empty(x_PC, *x_PC.shape)
    grid = triton.cdiv(rows, ROWS), triton.cdiv(C, BLOCK)
    if x_PC.numel():
        _cast_rows[grid](x_PC, out.codes, out.exponents, rows, _bits(floor), C, ROWS, BLOCK)
    return out


def swiglu_cast(gate_PF: Tensor, up_PF: Tensor, weight_P: Tensor | None, limit: float, floor: float = FLOOR) -> Coded:
    """`trainer.precision.casts.swiglu_cast`; its exponential is the device's, so a code may be the next one."""
    gate_PF, up_PF = operand(gate_PF), operand(up_PF)
    weight_P = None if weight_P is None else operand(weight_P)
    (rows, C), out = gate_PF.shape, _empty(gate_PF, *gate_PF.shape)
    grid, has_weight = (triton.cdiv(rows, ROWS), triton.cdiv(C, BLOCK)), weight_P is not None
    if gate_PF.numel():
        operands = gate_PF, up_PF, weight_P, out.codes, out.exponents
        _swiglu_cast[grid](*operands, rows, limit, _bits(floor), C, has_weight, ROWS, BLOCK)
    return out


def cast_columns(x_PC: Tensor, floor: float = FLOOR) -> Coded:
    """`trainer.precision.casts.cast_columns`: codes [C, P], exponents [C, ceil(P / 128)]."""
    x_PC = operand(x_PC)
    (rows, C), out = x_PC.shape, _empty(x_PC, *x_PC.shape[::-1])
    grid = triton.cdiv(rows, BLOCK), triton.cdiv(C, COLUMNS)
    if x_PC.numel():
        _cast_columns[grid](x_PC, out.codes, out.exponents, rows, _bits(floor), C, COLUMNS, BLOCK)
    return out


def recast_columns(coded: Coded, floor: float = FLOOR) -> Coded:
    """`trainer.precision.casts.recast_columns`, without the numbers in between."""
    codes, exponents = operand(coded.codes), operand(coded.exponents)
    (rows, C), out = codes.shape, _empty(codes, *codes.shape[::-1])
    grid = triton.cdiv(rows, BLOCK), triton.cdiv(C, COLUMNS)
    if codes.numel():
        _recast_columns[grid](codes, exponents, out.codes, out.exponents, rows, _bits(floor), C, COLUMNS, BLOCK)
    return out


def _empty(like: Tensor, rows: int, columns: int) -> Coded:
    shapes = (rows, columns), (rows, triton.cdiv(columns, BLOCK))
    codes, exponents = (like.new_empty(shape, dtype=torch.uint8) for shape in shapes)
    return Coded(codes=codes, exponents=exponents)


def _bits(floor: float) -> int:
    """The floor's key: as fp32 has it, which also serves for subnormal ones, for their scale is the smallest."""
    return struct.unpack("<i", struct.pack("<f", floor))[0]
