"""One layer: an mHC site around attention, an mHC site around the mixture of experts (R 2.2; spec 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import mhc
from model.attention import Attention, IndexerStatistics, Place
from model.config import ModelConfig
from model.layers import RMSNorm, island_dtype, run
from model.losses import attach
from model.moe import MoE, RouterStatistics


@dataclass(frozen=True, kw_only=True, slots=True)
class TermScales:
    """weight / count of the terms that layers add to the loss, the count over the whole optimizer step; 0 adds none."""

    balance: float = 0.0
    mtp_balance: float = 0.0
    indexer: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStatistics:
    """What one block reports: of its router, and of its indexer if it has one and it ran."""

    router: RouterStatistics
    indexer: IndexerStatistics | None


class Block(nn.Module):
    """attn_norm, attn, ffn_norm, ffn and the two mHC sites' hc_*_fn, hc_*_base, hc_*_scale (at least fp32).

    `enter` and `expand` are seams for kernels: same signatures as the functions of `model.mhc`. `run_attn` and
    `run_ffn` are seams for recomputation, called like `model.layers.run`.
    """

    def __init__(self, config: ModelConfig, *, ratio: int, hashed: bool, dtype: torch.dtype, held: range) -> None:
        super().__init__()
        self.config = config
        self.enter, self.expand = mhc.enter, mhc.expand
        self.run_attn, self.run_ffn = run, run
        D, N, island = config.hidden_size, config.hc_mult, island_dtype(dtype)
        rows = (2 + N) * N
        self.attn_norm = RMSNorm(D, config.rms_norm_eps, dtype)
        self.attn = Attention(config, ratio, dtype)
        self.ffn_norm = RMSNorm(D, config.rms_norm_eps, dtype)
        self.ffn = MoE(config, hashed=hashed, dtype=dtype, held=held)
        self.hc_attn_fn = nn.Parameter(torch.empty(rows, N * D, dtype=island))
        self.hc_attn_base = nn.Parameter(torch.empty(rows, dtype=island))
        self.hc_attn_scale = nn.Parameter(torch.empty(3, dtype=island))
        self.hc_ffn_fn = nn.Parameter(torch.empty(rows, N * D, dtype=island))
        self.hc_ffn_base = nn.Parameter(torch.empty(rows, dtype=island))
        self.hc_ffn_scale = nn.Parameter(torch.empty(3, dtype=island))

    def forward(
        self, x_BTND: Tensor, token_BT: Tensor, place: Place, balance: float, indexer: float
    ) -> tuple[Tensor, BlockStatistics]:
        """balance, indexer: scales of this layer's loss terms, attached to the stream by an identity."""
        u_BTD, post, comb = self.site(x_BTND, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
        y_BTD, indexed = self.run_attn(self.attn, self.attn_norm(u_BTD), place)
        if indexed is not None:
            y_BTD = attach(y_BTD, indexed.kl_sum, indexer)
        x_BTND = self.expand(x_BTND, y_BTD, post, comb)

        u_BTD, post, comb = self.site(x_BTND, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
        h_BTD = self.ffn_norm(u_BTD)
        y_BTD, routed = self.run_ffn(self.ffn, h_BTD, token_BT, place.layout.document_BT)
        if routed.balance_sum is not None:
            y_BTD = attach(y_BTD, routed.balance_sum, balance)
        return self.expand(x_BTND, y_BTD, post, comb), BlockStatistics(router=routed, indexer=indexed)

    def site(self, x_BTND: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u_BTD, post_BTN, comb_BTNN of one of the block's two sites: `mhc.enter` with the model's constants."""
        config = self.config
        return self.enter(
            x_BTND,
            fn,
            base,
            scale,
            iterations=config.hc_sinkhorn_iters,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
