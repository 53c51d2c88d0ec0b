"""The compressor's pooling: the twin of `model.compressor.pool`, straight from the tokens, without gathered copies.

A program has some channels of one block: its own tokens, and with overlap, as rows before them, the tokens of the block
before in their other series of channels. Each token is in at most one block, and in one series of it, so the backward
pass writes every gradient of a token once; rows of `ape` are added up over CHUNK blocks, then over all.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.operand import operand
from model.visibility import Blocks

ELEMENTS = 4096
"""Elements of a tile, rows times channels."""
CHUNK = 8
"""Blocks whose share of the gradient of `ape` one program adds up."""


@triton.jit
def _rows(token_ptr, previous_ptr, block, M: tl.constexpr, C: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr):
    """The rows of one block: which exist, their token, slot, place in the block and first channel.

    With OVERLAP 1 rows 0 .. M - 1 are the tokens of the block before, in the channels below C; else there are M rows.
    """
    row = tl.arange(0, ROWS)
    exists = row < M * (1 + OVERLAP)
    if OVERLAP:
        exists = exists & ((row >= M) | (tl.load(previous_ptr + block) != 0))
    slot = block - tl.where(row < M, OVERLAP, 0)
    token = tl.load(token_ptr + slot * M + row % M, mask=exists, other=0)
    return exists, token, slot, row % M, tl.where(row >= M, C, 0)


@triton.jit
def _weights(logit_ptr, ape_ptr, base, place, first, channel, mask, WIDTH: tl.constexpr):
    """The softmax over the rows of logit + ape, per channel; 0 in rows that do not exist."""
    ape = tl.load(ape_ptr + (place * WIDTH + first)[:, None] + channel[None, :], mask=mask, other=0.0)
    logit = tl.load(logit_ptr + base[:, None] + channel[None, :], mask=mask, other=0.0) + ape
    logit = tl.where(mask, logit, float("-inf"))
    # A channel beyond the last has no row: its maximum is no number to subtract.
    highest = tl.max(logit, 0)
    weight = tl.exp(logit - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
    total = tl.sum(weight, 0)
    return weight / tl.where(total > 0, total, 1.0)[None, :]


@triton.jit
def _forward(
    value_ptr, logit_ptr, ape_ptr, token_ptr, previous_ptr, out_ptr, T, S,
    M: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    exists, token, _, place, first = _rows(token_ptr, previous_ptr, block, M, C, OVERLAP, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = exists[:, None] & (channel < C)[None, :]
    base = (block // S * T + token) * WIDTH + first
    weight = _weights(logit_ptr, ape_ptr, base, place, first, channel, mask, WIDTH)
    value = tl.load(value_ptr + base[:, None] + channel[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + block * C + channel, tl.sum(weight * value, 0), mask=channel < C)


@triton.jit
def _backward(
    value_ptr, logit_ptr, ape_ptr, token_ptr, previous_ptr, member_ptr, grad_ptr,
    grad_value_ptr, grad_logit_ptr, part_ptr, T, S, blocks,
    M: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # c = sum_j w_j v_j, w = softmax(logit + ape): dv_j = w_j g, dlogit_j = w_j (v_j - c) g.
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad_ape = tl.zeros((ROWS, BLOCK), tl.float32)
    row = tl.arange(0, ROWS)
    for step in range(CHUNK):
        number = tl.program_id(0).to(tl.int64) * CHUNK + step
        block = tl.minimum(number, blocks - 1)
        exists, token, slot, place, first = _rows(token_ptr, previous_ptr, block, M, C, OVERLAP, ROWS)
        # A slot without a block names tokens too; only members of a block take gradients. A short chunk ends early.
        member = tl.load(member_ptr + block // S * T + token, mask=exists, other=-1)
        exists = exists & (member == slot % S * M + place) & (number < blocks)
        mask = exists[:, None] & (channel < C)[None, :]
        base = (block // S * T + token) * WIDTH + first
        weight = _weights(logit_ptr, ape_ptr, base, place, first, channel, mask, WIDTH)
        value = tl.load(value_ptr + base[:, None] + channel[None, :], mask=mask, other=0.0)
        grad = weight * tl.load(grad_ptr + block * C + channel, mask=channel < C, other=0.0)[None, :]
        grad_logit = grad * (value - tl.sum(weight * value, 0)[None, :])
        tl.store(grad_value_ptr + base[:, None] + channel[None, :], grad, mask=mask)
        tl.store(grad_logit_ptr + base[:, None] + channel[None, :], grad_logit, mask=mask)
        grad_ape += tl.where(mask, grad_logit, 0.0)
    part = (tl.program_id(0).to(tl.int64) * M + row % M) * WIDTH + tl.where(row >= M, C, 0)
    mask = (row < M * (1 + OVERLAP))[:, None] & (channel < C)[None, :]
    tl.store(part_ptr + part[:, None] + channel[None, :], grad_ape, mask=mask)


def pool(value_BTC: Tensor, logit_BTC: Tensor, ape_MC: Tensor, blocks: Blocks, *, overlap: bool) -> Tensor:
    """`model.compressor.pool`: every block's values weighed by the softmax of logit + ape, [B, S, C], all in fp32."""
    where = (blocks.token_BSM, blocks.has_previous_BS, blocks.member_BT)
    return _Pool.apply(operand(value_BTC), operand(logit_BTC), operand(ape_MC), *map(operand, where), overlap)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value_BTC: Tensor, logit_BTC: Tensor, ape_MC: Tensor, token_BSM: Tensor, previous_BS: Tensor,
        member_BT: Tensor, overlap: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(value_BTC, logit_BTC, ape_MC, token_BSM, previous_BS, member_BT)
        ctx.overlap = overlap
        (B, S, _), sizes = token_BSM.shape, _sizes(ape_MC, overlap)
        out_BSC = value_BTC.new_empty(B, S, sizes["C"])
        operands = (value_BTC, logit_BTC, ape_MC, token_BSM, previous_BS, out_BSC, value_BTC.shape[1], S)
        _forward[(B * S, triton.cdiv(sizes["C"], sizes["BLOCK"]))](*operands, **sizes)
        return out_BSC

    @staticmethod
    def backward(ctx: Any, grad_BSC: Tensor) -> tuple[Tensor | None, ...]:
        # Asked for once: recomputation hands them out only once.
        saved = ctx.saved_tensors
        value_BTC, logit_BTC, ape_MC, token_BSM, _, _ = saved
        (B, S, _), sizes = token_BSM.shape, _sizes(ape_MC, ctx.overlap)
        grad_value, grad_logit = torch.zeros_like(value_BTC), torch.zeros_like(logit_BTC)
        chunks = triton.cdiv(B * S, CHUNK)
        part = ape_MC.new_empty(chunks, *ape_MC.shape)
        operands = (*saved, grad_BSC.contiguous(), grad_value, grad_logit, part, value_BTC.shape[1], S)
        _backward[(chunks, triton.cdiv(sizes["C"], sizes["BLOCK"]))](*operands, B * S, **sizes, CHUNK=CHUNK)
        return grad_value, grad_logit, part.sum(0), None, None, None, None


def _sizes(ape_MC: Tensor, overlap: bool) -> dict[str, int]:
    M, width = ape_MC.shape
    C = width // 2 if overlap else width
    rows = triton.next_power_of_2(2 * M if overlap else M)
    block = max(1, min(ELEMENTS // rows, triton.next_power_of_2(C)))
    return {"M": M, "C": C, "WIDTH": width, "OVERLAP": int(overlap), "ROWS": rows, "BLOCK": block}
