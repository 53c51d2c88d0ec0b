"""Attention of one layer: window only, CSA (overlapping compressor and indexer) or HCA (R 2.3; spec 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import indexer
from model.attend import attend
from model.compressor import Compressor
from model.config import CSA_RATIO, AttentionMode, ModelConfig
from model.indexer import Index, Indexer, Target
from model.layers import Linear, RMSNorm, Rounding, island_dtype, unrounded
from model.rope import Rotation, norm_rotate, rotate
from model.sight import Sight
from model.visibility import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerStatistics:
    """Of one CSA layer: the KL sum (with gradient, to the indexer only) and, if measured, recall (hits, picks)."""

    kl_sum: Tensor
    recall: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the tokens of a batch are: the layout, and by rate (0: window only) the rotations of tokens and blocks."""

    layout: Layout
    token_turn: dict[int, Rotation]
    block_turn: dict[int, Rotation]
    mode: AttentionMode
    measure_recall: bool = False


class Attention(nn.Module):
    """wq_a, q_norm, wq_b, wkv, kv_norm, attn_sink, wo_a (G groups), wo_b; compressor and indexer by `ratio`.

    norm_rotate, rotate, attend and select are seams for kernels: same signatures as the functions of those names.
    rounding is a precision seam: what the window's keys go through; entries go through that of the compressor.
    """

    def __init__(self, config: ModelConfig, ratio: int, dtype: torch.dtype) -> None:
        super().__init__()
        D, H, C, Q = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
        self.config, self.ratio = config, ratio
        self.rounding: Rounding = unrounded
        self.norm_rotate, self.rotate, self.attend, self.select = norm_rotate, rotate, attend, indexer.select
        self.wq_a = Linear(D, Q, dtype)
        self.q_norm = RMSNorm(Q, config.rms_norm_eps, dtype)
        self.wq_b = Linear(Q, H * C, dtype)
        self.wkv = Linear(D, C, dtype)
        self.kv_norm = RMSNorm(C, config.rms_norm_eps, dtype)
        self.attn_sink = nn.Parameter(torch.empty(H, dtype=island_dtype(dtype)))
        self.wo_a = GroupedLinear(config.o_groups, H * C // config.o_groups, config.o_lora_rank, dtype)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, D, dtype)
        self.compressor = self.indexer = None
        if ratio:
            overlap = ratio == CSA_RATIO
            self.compressor = Compressor(D, C, ratio, overlap=overlap, eps=config.rms_norm_eps, dtype=dtype)
        if ratio == CSA_RATIO:
            self.indexer = Indexer(config, dtype)

    def forward(self, h_BTD: Tensor, place: Place) -> tuple[Tensor, IndexerStatistics | None]:
        turn_T = place.token_turn[self.ratio]
        q_BTHC, qr_BTQ = self.queries(h_BTD, turn_T)
        kv_BTC = self.keys(h_BTD, turn_T)
        entry_BSC = index = None
        if self.compressor is not None:
            entry_BSC = self.compressor(h_BTD, place.layout.blocks[self.ratio], place.block_turn[self.ratio])
        if self.indexer is not None and place.mode != "dense":
            blocks = place.layout.blocks[self.ratio]
            index = self.indexer(h_BTD, qr_BTQ, blocks, turn_T, place.block_turn[self.ratio])
        o_BTHC, statistics = self._attend(q_BTHC, kv_BTC, entry_BSC, index, place)
        return self.output(o_BTHC, turn_T), statistics

    def queries(self, h_BTD: Tensor, turn_T: Rotation) -> tuple[Tensor, Tensor]:
        """q_BTHC, normalised per head and rotated, and the latent qr_BTQ, which the indexer shares."""
        qr_BTQ = self.q_norm(self.wq_a(h_BTD))
        q_BTHC = self.wq_b(qr_BTQ).unflatten(-1, (self.config.num_attention_heads, self.config.head_dim))
        return self.norm_rotate(q_BTHC, None, self.config.rms_norm_eps, turn_T), qr_BTQ

    def keys(self, h_BTD: Tensor, turn_T: Rotation) -> Tensor:
        """kv_BTC: the window's keys, which are its values too, normalised, rotated and rounded."""
        return self.rounding(self.norm_rotate(self.wkv(h_BTD), self.kv_norm.weight, self.kv_norm.eps, turn_T))

    def output(self, o_BTHC: Tensor, turn_T: Rotation) -> Tensor:
        """Rotated back at the query's position, then through the groups: y_BTD."""
        o_BTHC = self.rotate(o_BTHC, turn_T, inverse=True)
        return self.wo_b(self.wo_a(o_BTHC.flatten(2)))

    def _attend(
        self, q_BTHC: Tensor, kv_BTC: Tensor, entry_BSC: Tensor | None, index: Index | None, place: Place
    ) -> tuple[Tensor, IndexerStatistics | None]:
        dense = Sight(layout=place.layout, window=self.config.sliding_window, ratio=self.ratio)
        if index is None or entry_BSC is None:
            return self.attend(q_BTHC, kv_BTC, entry_BSC, self.attn_sink, dense)[0], None
        selected_BTZ, sight = None, dense
        if place.mode == "sparse" or place.measure_recall:
            selected_BTZ = self.select(index, self.config.index_topk, dense)
        if place.mode == "sparse" and selected_BTZ is not None:
            sight = dense.restricted(selected_BTZ)
        o_BTHC, lse_BTH = self.attend(q_BTHC, kv_BTC, entry_BSC, self.attn_sink, sight)
        target = Target(q_BTHC=q_BTHC.detach(), entry_BSC=entry_BSC.detach(), lse_BTH=lse_BTH)
        counted_BT = place.layout.counted_BT
        kl_sum = indexer.kl_sum(index, target, sight, counted_BT)
        if not place.measure_recall or selected_BTZ is None:
            return o_BTHC, IndexerStatistics(kl_sum=kl_sum, recall=None)
        if sight is not dense:
            lse_BTH = self.attend(q_BTHC, kv_BTC, entry_BSC, self.attn_sink, dense)[1]
        target = Target(q_BTHC=target.q_BTHC, entry_BSC=target.entry_BSC, lse_BTH=lse_BTH)
        recall = indexer.recall(selected_BTZ, target, dense, counted_BT)
        return o_BTHC, IndexerStatistics(kl_sum=kl_sum, recall=recall)


def group_products(x_BTGC: Tensor, weight_GOC: Tensor) -> Tensor:
    """y_g = x_g W_g^T for each group: y_BTGO."""
    return torch.einsum("btgc,goc->btgo", x_BTGC, weight_GOC)


class GroupedLinear(nn.Module):
    """G maps side by side, y_g = W_g x_g: W_g [out, in] stored one below the other as weight [G * out, in].

    `matmul` is the precision seam: same signature as `group_products`.
    """

    def __init__(self, groups: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.groups, self.matmul = groups, group_products
        self.weight = nn.Parameter(torch.empty(groups * out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x_BTGC = x.unflatten(-1, (self.groups, -1))
        return self.matmul(x_BTGC, self.weight.unflatten(0, (self.groups, -1))).flatten(2)
