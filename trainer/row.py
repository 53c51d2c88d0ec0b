"""One packed row through the model: the leaf of every sum. Losses by term as sums, gradients into `p.grad`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from model.block import BlockStatistics, TermScales
from model.config import AttentionMode
from model.losses import TermCounts, count, cross_entropy_sum, mtp_target
from model.transformer import Output, Transformer
from trainer.laps import Laps


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSums:
    """Sums over one row. Losses in nats: lm, mtp over targets; balance, indexer by layer, None where a layer has none.

    load_LE: int64 counted tokens per expert and layer, the MTP block last. entropy_L: router entropy by layer.
    recall_L: (hits, picks) of the indexer by layer, None where a layer has none or it was not measured.
    source: number of the row's data source. targets: its learned targets. layers: the numbers of these layers.
    """

    lm: float
    mtp: float
    balance_L: tuple[float | None, ...]
    indexer_L: tuple[float | None, ...]
    load_LE: Tensor
    entropy_L: tuple[float, ...]
    recall_L: tuple[tuple[int, int] | None, ...]
    source: int
    targets: int
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Passed:
    """What a forward pass leaves. end: where the backward pass begins, the loss; the streams for the next layers.

    lm, mtp: the loss sums, 0 where the last layer did not run. end is None where nothing here learns.
    """

    output: Output
    lm: Tensor
    mtp: Tensor
    end: Tensor | None
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What one token's terms weigh in the loss of the step: weight / count over the whole step."""

    lm: float
    mtp: float
    layers: TermScales


def weigh(counts: TermCounts, *, mtp: float, balance: float, indexer: float) -> Weights:
    """The loss's weights from the terms' own weights and their denominators over the step."""
    return Weights(
        lm=_per(1.0, counts.lm),
        mtp=_per(mtp, counts.mtp),
        layers=TermScales(
            balance=_per(balance, counts.tokens),
            mtp_balance=_per(balance, counts.mtp_tokens),
            indexer=_per(indexer, counts.indexer),
        ),
    )


def _per(weight: float, count: int) -> float:
    return weight / count if count else 0.0


def pick(batch: Batch, index: int, device: torch.device) -> Batch:
    """Row `index` of a batch as a batch of one, on the device."""
    one = slice(index, index + 1)
    return Batch(
        token_BT=batch.token_BT[one].to(device),
        target_BT=batch.target_BT[one].to(device),
        document_BT=batch.document_BT[one].to(device),
        position_BT=batch.position_BT[one].to(device),
        source_B=batch.source_B[one],
    )


def count_rows(batch: Batch) -> TermCounts:
    """The denominators of a batch."""
    return count(batch.target_BT, batch.document_BT, batch.position_BT)


def learn(model: Transformer, row: Batch, mode: AttentionMode, weights: Weights, laps: Laps | None = None) -> RowSums:
    """Forward and backward of one row, all terms. Gradients are left in the parameters' `grad`; two laps if timed."""
    return _learn(forward(model, row, mode, weights), row, laps)


def learn_indexer(model: Transformer, row: Batch, weights: Weights, laps: Laps | None = None) -> RowSums:
    """Forward with dense attention and backward of the indexers' terms alone (warm-up stage, V3.2 2.1)."""
    return _learn(forward(model, row, "indexer_warmup", weights), row, laps)


def _learn(passed: Passed, row: Batch, laps: Laps | None) -> RowSums:
    _mark(laps)
    assert passed.end is not None, "the whole model has something to learn"
    passed.end.backward()
    _mark(laps)
    return sums(passed, row)


def forward(
    model: Transformer,
    row: Batch,
    mode: AttentionMode,
    weights: Weights,
    x_BTND: Tensor | None = None,
    layers: range | None = None,
) -> Passed:
    """The forward pass of one row through `layers`, default all; x_BTND: see `Transformer.forward`."""
    warmup = mode == "indexer_warmup"
    output = model(
        row.token_BT,
        row.document_BT,
        row.position_BT,
        mode=mode,
        scales=None if warmup else weights.layers,
        x_BTND=x_BTND,
        layers=layers,
    )
    with torch.set_grad_enabled(torch.is_grad_enabled() and not warmup):
        lm, mtp = heads(model, output, row)
    if warmup:
        terms = [layer.indexer.kl_sum for layer in output.layers if layer.indexer is not None]
        end = torch.stack(terms).sum() * weights.layers.indexer if terms else None
    else:
        end = lm * weights.lm + mtp * weights.mtp if output.x_BTND is None else output.x_BTND
    return Passed(output=output, lm=lm, mtp=mtp, end=end, layers=_numbers(model, output, layers))


@torch.no_grad()
def measure(
    model: Transformer, row: Batch, mode: AttentionMode, x_BTND: Tensor | None = None, layers: range | None = None
) -> Passed:
    """Forward only, with the indexer's recall of the dense selection where an indexer runs."""
    ids = row.token_BT, row.document_BT, row.position_BT
    output = model(*ids, mode=mode, measure_recall=True, x_BTND=x_BTND, layers=layers)
    lm, mtp = heads(model, output, row)
    return Passed(output=output, lm=lm, mtp=mtp, end=output.x_BTND, layers=_numbers(model, output, layers))


def _numbers(model: Transformer, output: Output, layers: range | None) -> tuple[int, ...]:
    """The numbers of the layers that ran; the MTP block's is the next after the last."""
    depth = model.config.num_hidden_layers
    return (*(range(depth) if layers is None else layers), *((depth,) if output.mtp else ()))


def heads(model: Transformer, output: Output, row: Batch) -> tuple[Tensor, Tensor]:
    """The loss sums (lm, mtp) behind the two heads, in nats; 0 where the last layer did not run."""
    if output.h_BTD is None:
        return torch.zeros(()), torch.zeros(())
    lm = cross_entropy_sum(output.h_BTD, model.head.weight, row.target_BT)
    if output.mtp_h_BTD is None:
        return lm, torch.zeros_like(lm)
    (branch,) = model.branches()
    target_BT = mtp_target(row.target_BT, row.document_BT)
    return lm, cross_entropy_sum(output.mtp_h_BTD, branch.head.weight, target_BT)


def sums(passed: Passed, row: Batch) -> RowSums:
    """What a forward pass has found, in numbers."""
    output = passed.output
    layers: tuple[BlockStatistics, ...] = output.layers + ((output.mtp,) if output.mtp else ())
    indexers = [layer.indexer for layer in layers]
    recalls = [None if of is None else of.recall for of in indexers]
    return RowSums(
        lm=passed.lm.item(),
        mtp=passed.mtp.item(),
        balance_L=tuple(_number(layer.router.balance_sum) for layer in layers),
        indexer_L=tuple(None if of is None else of.kl_sum.item() for of in indexers),
        load_LE=torch.stack([layer.router.load_E for layer in layers]).cpu(),
        entropy_L=tuple(layer.router.entropy_sum.item() for layer in layers),
        recall_L=tuple(None if recall is None else (int(recall[0]), int(recall[1])) for recall in recalls),
        source=int(row.source_B[0]),
        targets=int((row.target_BT >= 0).sum()),
        layers=passed.layers,
    )


def join(parts: Sequence[RowSums]) -> RowSums:
    """The sums of one row from those of its layers, which were computed apart; the last layer's part has the losses."""
    if len(parts) == 1:
        return parts[0]
    places = {number: (one, at) for one in parts for at, number in enumerate(one.layers)}
    layers = sorted(places)

    def by_layer(name: str) -> Any:
        return tuple(getattr(one, name)[at] for one, at in map(places.__getitem__, layers))

    last, _ = places[layers[-1]]
    return replace(
        last,
        load_LE=torch.cat([one.load_LE[at : at + 1] for one, at in map(places.__getitem__, layers)]),
        layers=tuple(layers),
        balance_L=by_layer("balance_L"),
        indexer_L=by_layer("indexer_L"),
        entropy_L=by_layer("entropy_L"),
        recall_L=by_layer("recall_L"),
    )


def _mark(laps: Laps | None) -> None:
    if laps is not None:
        laps.mark()


def _number(term: Tensor | None) -> float | None:
    return None if term is None else term.item()
