"""The whole model: embedding into N streams, blocks, last collapse, norm, head, and the MTP branch (R 2; spec 1-4)."""

from collections.abc import Callable, Collection
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
    """h_BTD: normalised, for the head. mtp_h_BTD: [B, T-1, D], None without MTP or if T = 1. Statistics by layer.

    x_BTND: the streams after the layers that ran, where the last was not among them; else None, and h_BTD is there.
    """

    x_BTND: Tensor | None
    h_BTD: Tensor | None
    mtp_h_BTD: Tensor | None
    layers: tuple[BlockStatistics, ...]
    mtp: BlockStatistics | None


class Transformer(nn.Module):
    """embed, layers, norm, head, hc_head_*, mtp: parameter names are the released ones (experts stacked).

    `run_block` is the seam for recomputing a whole layer, called like `model.layers.run`; `relay` the one for decoding
    where other layers are elsewhere.
    Built with uninitialised weights: fill them by `model.init.initialize` or `model.names.load_released`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        experts: range | None = None,
        layers: Collection[int] | None = None,
    ) -> None:
        """experts: those of each layer that are here; layers: those of the model that are here; default all.

        The first layer brings the embedding, the last one the heads and the MTP branch, which embeds tokens, too.
        """
        super().__init__()
        self.config, self.dtype = config, dtype
        self.held = range(config.n_routed_experts) if experts is None else experts
        self.numbers = tuple(range(config.num_hidden_layers) if layers is None else sorted(layers))
        self.run_block, self.relay = run, relay
        branches = config.num_nextn_predict_layers if self.is_last else 0
        if self.is_first or branches:
            self.embed = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList()
        for i in self.numbers:
            ratio, hashed = config.attention_ratios[i], i < config.num_hash_layers
            self.layers.add_module(str(i), Block(config, ratio=ratio, hashed=hashed, dtype=dtype, held=self.held))
        if self.is_last:
            self._add_end()
        self.mtp = nn.ModuleList(MTP(config, dtype, self.held) for _ in range(branches))
        self.share_weights()

    def _add_end(self) -> None:
        """What comes after the last layer."""
        config, dtype = self.config, self.dtype
        D, N, island = config.hidden_size, config.hc_mult, island_dtype(dtype)
        self.hc_head_fn = nn.Parameter(torch.empty(N, N * D, dtype=island))
        self.hc_head_base = nn.Parameter(torch.empty(N, dtype=island))
        self.hc_head_scale = nn.Parameter(torch.empty(1, dtype=island))
        self.norm = RMSNorm(D, config.rms_norm_eps, dtype)
        self.head = Linear(D, config.vocab_size, dtype, fp32_product)

    @property
    def block_numbers(self) -> tuple[int, ...]:
        """The numbers of `blocks()`; the MTP block's is the next after the last layer's."""
        return (*self.numbers, *(self.config.num_hidden_layers for _ in self.mtp))

    @property
    def is_first(self) -> bool:
        """Whether the first layer is here."""
        return 0 in self.numbers

    @property
    def is_last(self) -> bool:
        """Whether the last layer is here."""
        return self.config.num_hidden_layers - 1 in self.numbers

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

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
        x_BTND: Tensor | None = None,
        layers: range | None = None,
    ) -> Output:
        """Run packed rows. Without document_BT and position_BT each row is one document.

        token_BT, document_BT (-1: padding), position_BT: int64 [B, T]. scales: of the layers' loss terms, default 0.
        layers: those to run, default all; x_BTND: the streams after the layer before them, none before the first.
        """
        scales = scales or TermScales()
        if document_BT is None or position_BT is None:
            document_BT = torch.zeros_like(token_BT)
            position_BT = torch.arange(token_BT.shape[1], device=token_BT.device).expand_as(token_BT)
        place = self.place(document_BT, position_BT, mode, measure_recall)
        x_BTND = self.streams(token_BT) if x_BTND is None else x_BTND
        layers, statistics = range(self.config.num_hidden_layers) if layers is None else layers, []
        for block in self.stretch(layers):
            x_BTND, of_block = self.run_block(block, x_BTND, token_BT, place, scales.balance, scales.indexer)
            statistics.append(of_block)
        if layers.stop < self.config.num_hidden_layers:
            return Output(x_BTND=x_BTND, h_BTD=None, mtp_h_BTD=None, layers=tuple(statistics), mtp=None)
        h_BTD = self.hidden(x_BTND)
        mtp_h_BTD = of_mtp = None
        for branch in self.branches() if token_BT.shape[1] > 1 else ():
            place = self.place(mtp_document(document_BT), position_BT[:, :-1], mode, False)
            mtp_h_BTD, of_mtp = branch.predict(x_BTND[:, :-1], token_BT[:, 1:], place, scales.mtp_balance)
        return Output(x_BTND=None, h_BTD=h_BTD, mtp_h_BTD=mtp_h_BTD, layers=tuple(statistics), mtp=of_mtp)

    def stretch(self, layers: range) -> list[Block]:
        """These layers of the model, in order; all of them must be here."""
        here = dict(self.layers.named_children())
        return [block for number in layers if isinstance(block := here[str(number)], Block)]

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


def relay(
    model: Transformer, token_BT: Tensor, advance: Callable[[range, Tensor], Tensor], end: Callable[[Tensor], Tensor]
) -> Tensor:
    """`end` of the streams after all layers, of a model that is whole. advance: x_BTND after these layers."""
    return end(advance(range(model.config.num_hidden_layers), model.streams(token_BT)))
