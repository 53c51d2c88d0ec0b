"""One row through the model without gradients, watched at its seams: how mHC mixes, how often SwiGLU clamps.

The seams (`Block.enter`, `Experts.swiglu`, `SharedExpert.swiglu`) are wrapped for the time of one forward pass: the
functions behind them, kernels too, get what they always get, and nothing is left on the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.batch import Batch
from model.block import Block
from model.config import AttentionMode
from model.experts import Experts, SharedExpert
from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """combs_BTNN: by mHC site in order of depth. clamped, values: int64 counts of SwiGLU inputs by call."""

    combs_BTNN: list[Tensor] = field(default_factory=list)
    clamped: list[Tensor] = field(default_factory=list)
    values: list[int] = field(default_factory=list)


@torch.no_grad()
def measure(model: Transformer, row: Batch, mode: AttentionMode) -> dict[str, float]:
    """The metrics named mhc/* and experts/* over one row (a batch of one); padding counts in experts/* only."""
    with watched(model) as seen:
        model(row.token_BT, row.document_BT, row.position_BT, mode=mode)
    main = 2 * len(model.layers)
    counted_BT = row.document_BT >= 0
    # The MTP branch is one token shorter.
    sums = [stochastic_errors(comb[counted_BT[:, : comb.shape[1]]]) for comb in seen.combs_BTNN]
    forward, backward = composite_gains([comb[counted_BT] for comb in seen.combs_BTNN[:main]])
    return {
        "mhc/row_sum_error": max(rows for rows, _ in sums),
        "mhc/col_sum_error": max(columns for _, columns in sums),
        "mhc/composite_gain": forward,
        "mhc/composite_gain_backward": backward,
        "experts/clamped_ratio": int(torch.stack(seen.clamped).sum()) / sum(seen.values),
    }


def stochastic_errors(comb_PNN: Tensor) -> tuple[float, float]:
    """The largest |sum - 1| over all tokens of comb's rows (over k of comb_jk) and columns (over j).

    The report's B is comb transposed: its rows are comb's columns.
    """
    return float((comb_PNN.sum(2) - 1).abs().max()), float((comb_PNN.sum(1) - 1).abs().max())


def composite_gains(combs_PNN: Sequence[Tensor]) -> tuple[float, float]:
    """What all sites together amplify at most, forwards and backwards: the mean over tokens of the composite's gains.

    Source: mHC paper, Amax gain magnitude: of the composite of the report's B, the largest absolute row sum (forward
    signal) and column sum (gradient). Math: X' = comb^T X at every site, so C = comb_1 comb_2 ... carries stream j at
    the bottom to stream k at the top; forward max_k sum_j |C_jk|, backward max_j sum_k |C_jk|. Doubly stochastic: 1.
    """
    composite_PNN = combs_PNN[0].double()
    for comb_PNN in combs_PNN[1:]:
        composite_PNN = composite_PNN @ comb_PNN.double()
    size_PNN = composite_PNN.abs()
    return float(size_PNN.sum(1).amax(-1).mean()), float(size_PNN.sum(2).amax(-1).mean())


@contextmanager
def watched(model: Transformer) -> Iterator[Seen]:
    """Within the block, what passes the seams of `model` is noted; they are put back after it."""
    seen, wrapped = Seen(), []

    def swiglu(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
            seen.clamped.append((gate > limit).sum() + (up.abs() > limit).sum())
            seen.values.append(gate.numel() + up.numel())
            return inner(gate, up, weight, limit)

        return noted

    def enter(inner: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def noted(*arguments: Tensor, **constants: float) -> tuple[Tensor, Tensor, Tensor]:
            u, post, comb = inner(*arguments, **constants)
            seen.combs_BTNN.append(comb)
            return u, post, comb

        return noted

    try:
        for module in model.modules():
            if isinstance(module, Block):
                wrapped.append((module, "enter", module.enter))
                module.enter = enter(module.enter)
            elif isinstance(module, Experts | SharedExpert):
                wrapped.append((module, "swiglu", module.swiglu))
                module.swiglu = swiglu(module.swiglu)
        yield seen
    finally:
        for module, name, inner in wrapped:
            setattr(module, name, inner)
