"""Runs the model on packed documents and notes everything the oracle notes, under the golden set's names.

One checking function, `differences`, is behind the tests against the golden set and behind the negative controls.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from model import indexer, mhc
from model.block import Block, TermScales
from model.config import CSA_RATIO, AttentionMode
from model.inventory import released_tensors
from model.losses import TermCounts, count, cross_entropy_sum, mtp_target
from model.names import alias_of, load_released, locate
from model.transformer import Output, Transformer
from tests.oracles.cases import random_case, write_released


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Packed rows as the trainer hands them to the model, int64 [B, T]; -1: no target, padding."""

    token_BT: Tensor
    document_BT: Tensor
    position_BT: Tensor
    target_BT: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weights of the terms beside the next token's."""

    mtp: float = 0.3
    balance: float = 0.0
    indexer: float = 0.0


def build(seed: int, dtype: torch.dtype = torch.float64, **overrides: Any) -> Transformer:
    """A tiny random model of the oracle's, loaded as a released folder."""
    with tempfile.TemporaryDirectory() as folder:
        write_released(Path(folder), *random_case(seed, **overrides))
        return load_released(folder, dtype)


def pack(
    documents: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]] | None = None,
    *,
    padding: int = 0,
    filler: int = 0,
) -> Rows:
    """One row of the documents, then `padding` tokens `filler`. Targets default to the next token of the document."""
    if targets is None:
        targets = [[*document[1:], -1] for document in documents]
    lengths = [len(document) for document in documents]
    pieces = {
        "token_BT": [*documents, [filler] * padding],
        "document_BT": [*([d] * n for d, n in enumerate(lengths)), [-1] * padding],
        "position_BT": [*(range(n) for n in lengths), range(padding)],
        "target_BT": [*targets, [-1] * padding],
    }
    return Rows(**{name: torch.tensor([[x for piece in row for x in piece]]) for name, row in pieces.items()})


def stack(rows: Sequence[Rows]) -> Rows:
    """Rows of equal length as one batch."""
    names = ("token_BT", "document_BT", "position_BT", "target_BT")
    return Rows(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names})


def observe(
    model: Transformer,
    rows: Rows,
    mode: AttentionMode = "sparse",
    weights: LossWeights | None = None,
    counts: TermCounts | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of all terms; what the golden set holds, of tokens in documents only, in row order.

    Besides the golden set's names: hidden.LAYER (streams after the layer), last_hidden, recall.LAYER. A gradient that
    is None counts as 0; the gradients of both uses of embedding and head are added. counts: the denominators, by
    default those of these rows.
    """
    weights = weights or LossWeights()
    model.zero_grad(set_to_none=True)
    counts = counts or count(rows.target_BT, rows.document_BT, rows.position_BT)
    scales = TermScales(
        balance=weights.balance / max(counts.tokens, 1),
        mtp_balance=weights.balance / max(counts.mtp_tokens, 1),
        indexer=weights.indexer / max(counts.indexer, 1),
    )
    with recorded(model, rows) as found:
        measure = mode == "indexer_warmup"  # the selection, which dense attention does not need
        output = model(
            rows.token_BT, rows.document_BT, rows.position_BT, mode=mode, scales=scales, measure_recall=measure
        )
    inside_BT, mtp_inside_BT = rows.document_BT >= 0, mtp_inside(rows.document_BT)
    found |= {"logits": model.logits(output.h_BTD)[inside_BT], "last_hidden": output.h_BTD[inside_BT]}
    lm = cross_entropy_sum(output.h_BTD, model.head.weight, rows.target_BT)
    mtp = torch.zeros_like(lm)
    if output.mtp_h_BTD is not None:
        found["mtp_logits"] = model.logits(output.mtp_h_BTD)[mtp_inside_BT]
        target_BT = mtp_target(rows.target_BT, rows.document_BT)
        mtp = cross_entropy_sum(output.mtp_h_BTD, model.mtp[0].head.weight, target_BT)
    found |= {"lm_sum": lm, "lm_count": torch.tensor(counts.lm)}
    found |= {"mtp_sum": mtp, "mtp_count": torch.tensor(counts.mtp)}
    loss = lm / max(counts.lm, 1) + weights.mtp * mtp / max(counts.mtp, 1)
    loss.backward()
    for name, term in layer_terms(output).items():
        kind, layer = name.split(".")
        denominator = {"indexer_sum": counts.indexer, "balance_sum": counts.tokens}[kind]
        denominator = counts.mtp_tokens if layer == "mtp" else denominator
        found |= {name: term, name.replace("_sum", "_count"): torch.tensor(denominator)}
        loss = loss + getattr(weights, kind.removesuffix("_sum")) * term / max(denominator, 1)
    found |= {"total": loss, **recalls(output)}
    return {name: value.detach() for name, value in (found | gradients(model)).items()}


def mixes_of(block: Block, x_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and comb of a block's attention site."""
    config = block.config
    product, rms_inverse = mhc.product_and_rms(x_BTND, block.hc_attn_fn, config.rms_norm_eps)
    constants = config.hc_mult, config.hc_sinkhorn_iters, config.hc_eps
    return mhc.gates(product * rms_inverse, block.hc_attn_base, block.hc_attn_scale, *constants)


def mtp_inside(document_BT: Tensor) -> Tensor:
    """True where the MTP branch has a token: one whose successor is of the same document, [B, T-1]."""
    return (document_BT[:, :-1] >= 0) & (document_BT[:, 1:] == document_BT[:, :-1])


def layer_terms(output: Output) -> dict[str, Tensor]:
    """balance_sum.LAYER and indexer_sum.LAYER of the layers that have them."""
    named = {str(i): layer for i, layer in enumerate(output.layers)} | ({"mtp": output.mtp} if output.mtp else {})
    terms = {}
    for name, layer in named.items():
        if layer.router.balance_sum is not None:
            terms[f"balance_sum.{name}"] = layer.router.balance_sum
        if layer.indexer is not None:
            terms[f"indexer_sum.{name}"] = layer.indexer.kl_sum
    return terms


def recalls(output: Output) -> dict[str, Tensor]:
    """recall.LAYER, int64 (hits, picks), of the layers that measured it."""
    indexed = {i: layer.indexer for i, layer in enumerate(output.layers) if layer.indexer is not None}
    return {f"recall.{i}": layer.recall for i, layer in indexed.items() if layer.recall is not None}


def gradients(model: Transformer) -> dict[str, Tensor]:
    """grad.NAME of every released tensor with a gradient."""
    parameters, found = dict(model.named_parameters()), {}
    shared = {alias_of(name): parameter for name, parameter in parameters.items() if alias_of(name)}
    for spec in released_tensors(model.config):
        if spec.kind == "buffer":
            continue
        where = locate(spec.name)
        uses = [parameters[where.parameter], *([shared[spec.name]] if spec.name in shared else [])]
        parts = [where.view(use.grad) for use in uses if use.grad is not None]
        found[f"grad.{spec.name}"] = sum(parts, torch.zeros_like(where.view(uses[0])))
    return found


@contextmanager
def recorded(model: Transformer, rows: Rows) -> Iterator[dict[str, Tensor]]:
    """Streams, chosen experts and selected blocks of every layer, noted while the model runs inside."""
    found: dict[str, Tensor] = {}
    indexed = iter([i for i, ratio in enumerate(model.config.attention_ratios) if ratio == CSA_RATIO])

    def noted_select(*arguments: Any) -> Tensor:
        selected_BTZ = indexer.select(*arguments)
        found[f"index_topk.{next(indexed)}"] = of_document(selected_BTZ, rows, model.config.index_topk)
        return selected_BTZ

    with ExitStack() as stack:
        for block in model.blocks():
            stack.enter_context(mock.patch.object(block.attn, "select", noted_select))
        blocks = {str(i): block for i, block in enumerate(model.layers)}
        for name, block in blocks.items() if not model.mtp else (blocks | {"mtp": model.mtp[0]}).items():
            for handle in note(name, block, rows, found):
                stack.callback(handle.remove)
        yield found


def note(name: str, block: nn.Module, rows: Rows, found: dict[str, Tensor]) -> list[Any]:
    """Hooks that put a block's streams and its chosen experts, ascending, into `found`."""
    inside_BT = mtp_inside(rows.document_BT) if name == "mtp" else rows.document_BT >= 0

    def streams(_: nn.Module, __: Any, result: Any) -> None:
        found[f"hidden.{name}"] = result[0][inside_BT]

    def experts(_: nn.Module, __: Any, route: Any) -> None:
        found[f"router_index.{name}"] = route.expert_BTK[inside_BT].sort(-1).values

    return [block.register_forward_hook(streams), block.ffn.gate.register_forward_hook(experts)]


def of_document(selected_BTZ: Tensor, rows: Rows, topk: int) -> Tensor:
    """Slots of a row as block numbers of each token's own document, ascending, -1 last, `topk` wide."""
    ends_BT = ((rows.position_BT + 1) % CSA_RATIO == 0).long()
    start_BT = torch.arange(rows.position_BT.shape[1]) - rows.position_BT
    before_BT = (ends_BT.cumsum(1) - ends_BT).gather(1, start_BT)
    none = torch.iinfo(torch.int64).max
    block_BTZ = (selected_BTZ - before_BT.unsqueeze(-1)).masked_fill(selected_BTZ < 0, none).sort(-1).values
    block_BTZ = block_BTZ.masked_fill(block_BTZ == none, -1)
    padded_BTZ = nn.functional.pad(block_BTZ, (0, topk - block_BTZ.shape[-1]), value=-1)
    return padded_BTZ[rows.document_BT >= 0]


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> dict[str, float]:
    """What differs: name -> largest |found - expected| / max(1, largest |expected|) above the limit.

    Infinite for what is missing, of another shape, not finite, or an integer that differs.
    """
    wrong = {}
    for name, value in expected.items():
        distance = math.inf
        if name in found and found[name].shape == value.shape:
            difference = (found[name].double() - value.double()).abs()
            distance = float(difference.max() / value.double().abs().max().clamp_min(1)) if value.numel() else 0.0
            if not value.is_floating_point() and distance:
                distance = math.inf
        if not distance <= limit:
            wrong[name] = distance if math.isfinite(distance) else math.inf
    return wrong
