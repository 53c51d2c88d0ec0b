"""Multi-token prediction of depth 1: one more block predicts token t + 2 (V3 2.2, spec 4.4)."""

import torch
from torch import Tensor, nn

from model import mhc
from model.attention import Place
from model.block import Block, BlockStatistics
from model.config import ModelConfig
from model.layers import Embedding, Linear, RMSNorm, fp32_product, island_dtype


class MTP(Block):
    """A window-attention block with e_proj, h_proj, enorm, hnorm, norm and its own hc_head.

    embed and head hold the main model's embedding and head: parameters of their own over the same storage, so that
    each use of a shared weight has its own gradient (`Transformer.share_weights`).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, held: range) -> None:
        super().__init__(config, ratio=0, hashed=False, dtype=dtype, held=held)
        D, N, eps = config.hidden_size, config.hc_mult, config.rms_norm_eps
        self.e_proj = Linear(D, D, dtype)
        self.h_proj = Linear(D, D, dtype)
        self.enorm = RMSNorm(D, eps, dtype)
        self.hnorm = RMSNorm(D, eps, dtype)
        self.norm = RMSNorm(D, eps, dtype)
        self.hc_head_fn = nn.Parameter(torch.empty(N, N * D, dtype=island_dtype(dtype)))
        self.hc_head_base = nn.Parameter(torch.empty(N, dtype=island_dtype(dtype)))
        self.hc_head_scale = nn.Parameter(torch.empty(1, dtype=island_dtype(dtype)))
        self.embed = Embedding(0, D, dtype)
        self.head = Linear(D, 0, dtype, fp32_product)

    def predict(self, x_BTND: Tensor, next_BT: Tensor, place: Place, balance: float) -> tuple[Tensor, BlockStatistics]:
        """h_BTD for the shared head. x_BTND: streams before the main model's hc_head; next_BT: ids of tokens t + 1."""
        embedded_BT1D = self.e_proj(self.enorm(self.embed(next_BT))).unsqueeze(2)
        x_BTND = embedded_BT1D + self.h_proj(self.hnorm(x_BTND))
        x_BTND, statistics = self(x_BTND, next_BT, place, balance, 0.0)
        collapsed = mhc.head(
            x_BTND,
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            hc_eps=self.config.hc_eps,
            norm_eps=self.config.rms_norm_eps,
        )
        return self.norm(collapsed), statistics
