"""What attention looks at, rounded: the indexer's q and k to FP4, the window's keys and compressed entries to FP8.

Trained with, so that a cache may hold codes. Values are the format's numbers in the run's type; gradients go straight
through the rounding. Source: R 5.2.1 and the released code (spec 3.3, 7.2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.attention import Attention
from model.layers import Rounding, unrounded
from model.transformer import Transformer
from trainer.precision.elements import Format
from trainer.precision.emulated import cast
from trainer.precision.health import Watch
from trainer.precision.qat import hadamard
from trainer.precision.recipe import LookedAt


def of_index(format: Format, operand: str, watch: Watch) -> Rounding:
    """Q(x H), H the Hadamard rotation, which cancels in q . k: for the indexer's q and k [..., J]."""

    def rounding(x: Tensor) -> Tensor:
        return _Straight.apply(hadamard(x), format, operand, watch)

    return rounding


def of_entries(format: Format, rotated: int, operand: str, watch: Watch) -> Rounding:
    """Q(x) but for the last `rotated` channels, which carry positions: for keys and entries [..., C]."""

    def rounding(x: Tensor) -> Tensor:
        still, turned = x.split([x.shape[-1] - rotated, rotated], dim=-1)
        return torch.cat((_Straight.apply(still, format, operand, watch), turned), dim=-1)

    return rounding


class Roundings:
    """What keys and entries of all views of a model go through, as it is at a time of the run."""

    def __init__(self, views: Sequence[Transformer], watches: Mapping[str, Watch]) -> None:
        self._holds, self._watches = LookedAt(), watches
        modules = (module for view in views for module in view.modules())
        self._attentions = [module for module in modules if isinstance(module, Attention)]

    def enter(self, holds: LookedAt) -> None:
        """Round to these formats from now on."""
        if holds == self._holds:
            return
        self._holds = holds
        for attn in self._attentions:
            attn.rounding = self._of_entries(holds.entries, attn.config.qk_rope_head_dim)
            if attn.compressor is not None:
                attn.compressor.rounding = attn.rounding
            if attn.indexer is not None:
                attn.indexer.rounding = self._of_index(holds.index, "q")
                attn.indexer.compressor.rounding = self._of_index(holds.index, "k")

    def _of_entries(self, format: Format | None, rotated: int) -> Rounding:
        return unrounded if format is None else of_entries(format, rotated, "entries", self._watches["attention"])

    def _of_index(self, format: Format | None, operand: str) -> Rounding:
        return unrounded if format is None else of_index(format, operand, self._watches["indexer"])


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Format, operand: str, watch: Watch) -> Tensor:
        return cast(x, format, operand, watch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None
