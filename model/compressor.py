"""The compressor: each block of m tokens becomes one key-value entry, a softmax-weighted mean per channel.

CSA (m = 4) overlaps: a block also weighs the tokens of the block before, through a second series of channels.
Source: R 2.3.1 eqs. 9-12 (CSA), R 2.3.2 eqs. 20-23 (HCA), released code (spec 3.2, 3.5). fp32 island.
"""

import torch
from torch import Tensor, nn

from model.gather import take
from model.layers import Linear, RMSNorm, Rounding, fp32_product, island_dtype, unrounded
from model.rope import Rotation, norm_rotate
from model.visibility import Blocks


def compress(value_BSMC: Tensor, logit_BSMC: Tensor) -> Tensor:
    """c_s = sum_j softmax_j(logit_sj) value_sj, the softmax over the block's M rows apart for each channel C."""
    return (torch.softmax(logit_BSMC, dim=2) * value_BSMC).sum(2)


def compress_overlapped(value_BSMC: Tensor, logit_BSMC: Tensor, has_previous_BS: Tensor) -> Tensor:
    """Blocks that also weigh the block before. Returns [B, S, C / 2].

    Layout: channels [: C/2] are the series a token contributes to the next block, [C/2 :] the one to its own.
    A document's first block has no block before: logits -inf, values 0.
    """
    half = value_BSMC.shape[-1] // 2
    missing = ~has_previous_BS[:, :, None, None]
    value_before = value_BSMC[..., :half].roll(1, dims=1).masked_fill(missing, 0)
    logit_before = logit_BSMC[..., :half].roll(1, dims=1).masked_fill(missing, -torch.inf)
    value = torch.cat((value_before, value_BSMC[..., half:]), dim=2)
    logit = torch.cat((logit_before, logit_BSMC[..., half:]), dim=2)
    return compress(value, logit)


def pool(value_BTC: Tensor, logit_BTC: Tensor, ape_MC: Tensor, blocks: Blocks, *, overlap: bool) -> Tensor:
    """Every block of a batch: its tokens' values weighed by the softmax of logit + ape, by `compress` or overlapped.

    value_BTC, logit_BTC in at least fp32 (C doubled if they overlap); ape_MC: bias by place in the block.
    Returns [B, S, C] in their type, not normalised yet; slots without a block hold numbers that nobody uses.
    """
    value_BSMC = _take(value_BTC, blocks)
    logit_BSMC = _take(logit_BTC, blocks) + ape_MC
    if overlap:
        return compress_overlapped(value_BSMC, logit_BSMC, blocks.has_previous_BS)
    return compress(value_BSMC, logit_BSMC)


def _take(x_BTC: Tensor, blocks: Blocks) -> Tensor:
    """Rows of x at the tokens of each block, [B, S, M, C]; a token is in at most one block."""
    B, T, _ = x_BTC.shape
    rows_B1 = torch.arange(B, device=x_BTC.device).unsqueeze(1)
    index_BP = blocks.token_BSM.flatten(1) + rows_B1 * T
    inverse_BT = torch.where(blocks.member_BT < 0, -1, blocks.member_BT + rows_B1 * index_BP.shape[1])
    picked = take(x_BTC.flatten(0, 1), index_BP.flatten(), inverse_BT.flatten())
    return picked.unflatten(0, blocks.token_BSM.shape)


class Compressor(nn.Module):
    """wkv, wgate [C or 2C, D], ape [m, C or 2C], norm [C]. Returns entries c_BSC, normalised and rotated.

    `pool` and `norm_rotate` are seams for kernels: same signatures as the functions. `rounding` is a precision seam:
    what finished entries go through.
    """

    def __init__(
        self, hidden: int, channels: int, ratio: int, *, overlap: bool, eps: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        width = 2 * channels if overlap else channels
        self.overlap = overlap
        self.pool, self.norm_rotate = pool, norm_rotate
        self.rounding: Rounding = unrounded
        self.wkv = Linear(hidden, width, dtype, fp32_product)
        self.wgate = Linear(hidden, width, dtype, fp32_product)
        self.ape = nn.Parameter(torch.empty(ratio, width, dtype=island_dtype(dtype)))
        self.norm = RMSNorm(channels, eps, dtype)

    def forward(self, h_BTD: Tensor, blocks: Blocks, turn_S: Rotation) -> Tensor:
        """turn_S: rotation at the position of each block's first token. The result has h's type."""
        entry_BSC = self.pool(self.wkv(h_BTD), self.wgate(h_BTD), self.ape, blocks, overlap=self.overlap)
        return self.finish(entry_BSC, turn_S, h_BTD.dtype)

    def finish(self, entry_BSC: Tensor, turn_S: Rotation, dtype: torch.dtype) -> Tensor:
        """Pooled blocks as entries: normalised, rotated at their first tokens, of this type, and rounded."""
        return self.rounding(self.norm_rotate(entry_BSC, self.norm.weight, self.norm.eps, turn_S).to(dtype))
