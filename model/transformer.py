"""The whole model: embedding into N streams, blocks, last collapse, norm, head, and the MTP branch (R 2; spec 1-4)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import mhc
from model.attention import Place
from model.block import Block, BlockStatistics, TermScales
from model.config import AttentionMode, ModelConfig
from model.layers import Embedding, Linear, RMSNorm, fp32_product, island_dtype, run
from model.losses import mtp_document
from model.mtp import MTP
from model.rope import Rotation, frequencies, rotation
from model.visibility import layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """h_BTD: normalised, for the head. mtp_h_BTD: [B, T-1, D], None without MTP or if T = 1. Statistics by layer."""

    h_BTD: Tensor
    mtp_h_BTD: Tensor | None
    layers: tuple[BlockStatistics, ...]
    mtp: BlockStatistics | None


class Transformer(nn.Module):
    """embed, layers, norm, head, hc_head_*, mtp: parameter names are the released ones (experts stacked).

    `run_block` is the seam for recomputing a whole layer, called like `model.layers.run`.
    Built with uninitialised weights: fill them by `model.init.initialize` or `model.names.load_released`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, experts: range | None = None) -> None:
        """experts: those of each layer that are here, default all."""
        super().__init__()
        self.config, self.dtype = config, dtype
        self.held = range(config.n_routed_experts) if experts is None else experts
        self.run_block = run
        D, N, island = config.hidden_size, config.hc_mult, island_dtype(dtype)
        self.embed = Embedding(config.vocab_size, D, dtype)
        self.layers = nn.ModuleList(
            Block(config, ratio=ratio, hashed=i < config.num_hash_layers, dtype=dtype, held=self.held)
            for i, ratio in enumerate(config.attention_ratios)
        )
        self.hc_head_fn = nn.Parameter(torch.empty(N, N * D, dtype=island))
        self.hc_head_base = nn.Parameter(torch.empty(N, dtype=island))
        self.hc_head_scale = nn.Parameter(torch.empty(1, dtype=island))
        self.norm = RMSNorm(D, config.rms_norm_eps, dtype)
        self.head = Linear(D, config.vocab_size, dtype, fp32_product)
        self.mtp = nn.ModuleList(MTP(config, dtype, self.held) for _ in range(config.num_nextn_predict_layers))
        self.share_weights()

    def share_weights(self) -> None:
        """Lay the MTP branch's embedding and head over the main model's storage; call again after moving the model."""
        for branch in self.branches():
            branch.embed.weight = nn.Parameter(self.embed.weight.data)
            branch.head.weight = nn.Parameter(self.head.weight.data)

    def branches(self) -> list[MTP]:
        """The MTP branch, if there is one."""
        return [branch for branch in self.mtp if isinstance(branch, MTP)]

    def blocks(self) -> list[Block]:
        """All blocks in order, the MTP branch last."""
        return [block for block in (*self.layers, *self.mtp) if isinstance(block, Block)]

    def forward(
        self,
        token_BT: Tensor,
        document_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
        *,
        mode: AttentionMode = "sparse",
        scales: TermScales | None = None,
        measure_recall: bool = False,
    ) -> Output:
        """Run packed rows. Without document_BT and position_BT each row is one document.

        token_BT, document_BT (-1: padding), position_BT: int64 [B, T]. scales: of the layers' loss terms, default 0.
        """
        scales = scales or TermScales()
        if document_BT is None or position_BT is None:
            document_BT = torch.zeros_like(token_BT)
            position_BT = torch.arange(token_BT.shape[1], device=token_BT.device).expand_as(token_BT)
        place = self.place(document_BT, position_BT, mode, measure_recall)
        x_BTND = self.streams(token_BT)
        statistics = []
        for block in self.layers:
            x_BTND, of_block = self.run_block(block, x_BTND, token_BT, place, scales.balance, scales.indexer)
            statistics.append(of_block)
        h_BTD = self.hidden(x_BTND)
        mtp_h_BTD = of_mtp = None
        for branch in self.branches() if token_BT.shape[1] > 1 else ():
            place = self.place(mtp_document(document_BT), position_BT[:, :-1], mode, False)
            mtp_h_BTD, of_mtp = branch.predict(x_BTND[:, :-1], token_BT[:, 1:], place, scales.mtp_balance)
        return Output(h_BTD=h_BTD, mtp_h_BTD=mtp_h_BTD, layers=tuple(statistics), mtp=of_mtp)

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] in at least fp32 of the main or the MTP branch (the head is shared)."""
        return self.head(h_BTD)

    def streams(self, token_BT: Tensor) -> Tensor:
        """x_BTND: N copies of the embedding."""
        return self.embed(token_BT).unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()

    def hidden(self, x_BTND: Tensor) -> Tensor:
        """h_BTD for the head: the last streams collapsed and normalised."""
        fn, base, scale = self.hc_head_fn, self.hc_head_base, self.hc_head_scale
        hc_eps, norm_eps = self.config.hc_eps, self.config.rms_norm_eps
        return self.norm(mhc.head(x_BTND, fn, base, scale, hc_eps=hc_eps, norm_eps=norm_eps))

    def place(self, document_BT: Tensor, position_BT: Tensor, mode: AttentionMode, measure_recall: bool) -> Place:
        """Where the tokens are and how they are rotated; see `Place`."""
        ratios = set(self.config.attention_ratios)
        where = layout(document_BT, position_BT, self.config.sliding_window, ratios)
        compressed = self.turn(position_BT, compressed=True)
        return Place(
            layout=where,
            token_turn=dict.fromkeys(ratios, compressed) | {0: self.turn(position_BT, compressed=False)},
            block_turn={r: self.turn(blocks.position_BS, compressed=True) for r, blocks in where.blocks.items()},
            mode=mode,
            measure_recall=measure_recall,
        )

    def turn(self, position: Tensor, *, compressed: bool) -> Rotation:
        """The rotation at integer positions [B, T], of layers with compression or of the others."""
        return rotation(frequencies(self.config, compressed=compressed), position, island_dtype(self.dtype))
