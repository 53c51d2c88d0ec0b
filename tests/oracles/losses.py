"""Oracle: the four training losses of one document as (sum, count), and the total of several documents.

Source: fact sheet sections 4.3 (balance, after the V3 report section 2.1.2), 4.4 (MTP) and 6 (indexer KL, after the
V3.2 report section 2.1). One `total(...).backward()` gives every parameter exactly its own gradient: the oracle
detaches all that enters the indexer and the KL target, so the KL reaches the indexer's parameters only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.attention import Blocks, Stage
from tests.oracles.deepseek_v4 import Layer, Result


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Sums (float64 scalars, differentiable) and the counts they are to be divided by, for one document.

    balance_*: per learned-routing layer ("mtp" included); count is the number of tokens the layer's router saw.
    indexer_*: per CSA layer; count is the number of tokens with at least one visible block.
    """

    lm_sum: Tensor
    lm_count: int
    mtp_sum: Tensor
    mtp_count: int
    balance_sum: dict[str, Tensor]
    balance_count: dict[str, int]
    indexer_sum: dict[str, Tensor]
    indexer_count: dict[str, int]


def losses(config: Mapping, result: Result, ids: Sequence[int], targets: Sequence[int] | None = None) -> Losses:
    """All losses of one document.

    targets[t] is the token that position t has to predict, -1 where nothing is learned; default: the next token, and
    -1 at the end. The MTP row t has to predict targets[t + 1]. A mask (-1) takes a token out of the two cross
    entropies; balance and indexer losses count every token of the document.
    """
    targets = list(targets) if targets is not None else [*ids[1:], -1]
    learned = {name: layer for name, layer in result.layers.items() if not layer.hashed}
    indexed = {name: layer.blocks for name, layer in result.layers.items() if layer.blocks.index_topk is not None}
    return Losses(
        lm_sum=cross_entropy_sum(result.logits_TV, targets),
        lm_count=sum(target >= 0 for target in targets),
        mtp_sum=cross_entropy_sum(result.mtp_logits_TV, targets[1:]),
        mtp_count=sum(target >= 0 for target in targets[1:]) if "mtp" in result.layers else 0,
        balance_sum={name: balance_sum(layer) for name, layer in learned.items()},
        balance_count={name: len(layer.router_index_TK) for name, layer in learned.items()},
        indexer_sum={name: indexer_sum(blocks, result.stage) for name, blocks in indexed.items()},
        indexer_count={name: int(blocks.visible_TS.any(dim=1).sum()) for name, blocks in indexed.items()},
    )


def cross_entropy_sum(logits_TV: Tensor, targets: Sequence[int]) -> Tensor:
    """sum over learned positions of -log softmax(logits)[target]."""
    total = logits_TV.new_zeros(())
    for logits_V, target in zip(logits_TV, targets, strict=False):
        if target >= 0:
            total = total + torch.logsumexp(logits_V, dim=0) - logits_V[target]
    return total


def balance_sum(layer: Layer) -> Tensor:
    """T * sum_i f_i P_i with f_i = E / (K T) * #{t : i in top-K of s_t} and P_i = mean_t s_ti / sum_j s_tj.

    s_t are the scores without the selection bias, as V3 2.1.2 writes it, so that f_i need not be how often i was
    chosen; of equal scores the lower expert counts. Times T, so that the sums of several documents divided by all
    their tokens is their token-weighted mean.
    """
    score_TE, chosen_per_token = layer.router_score_TE, layer.router_index_TK.shape[1]
    tokens, experts = score_TE.shape
    frequency = [0] * experts
    for score_E in score_TE.tolist():
        for i in sorted(range(experts), key=lambda e: (-score_E[e], e))[:chosen_per_token]:
            frequency[i] += 1
    total = score_TE.new_zeros(())
    for i in range(experts):
        weight = experts / (chosen_per_token * tokens) * frequency[i]
        total = total + weight * (score_TE[:, i] / score_TE.sum(dim=1)).mean()
    return tokens * total


def indexer_sum(blocks: Blocks, stage: Stage) -> Tensor:
    """sum_t KL(p_t || softmax(I_t)) over the tokens that see a block.

    p_t: attention probabilities summed over heads, on compressed blocks only, renormalised. Dense stage: over all
    visible blocks. Sparse stage: p_t and the softmax both over the selected blocks only.
    """
    score_TS = blocks.index_score_TS
    total = score_TS.new_zeros(())
    for t in range(len(score_TS)):
        among = blocks.index_topk[t] if stage == "sparse" else blocks.visible_TS[t].nonzero().flatten().tolist()
        if among:
            mass_S = blocks.attention_HTS[:, t, among].sum(dim=0)
            target_S = mass_S / mass_S.sum()
            log_predicted_S = torch.log_softmax(score_TS[t, among], dim=0)
            total = total + (torch.xlogy(target_S, target_S) - target_S * log_predicted_S).sum()
    return total


def total(parts: Sequence[Losses], *, mtp_weight: float, balance_weight: float, indexer_weight: float) -> Tensor:
    """lm + mtp_weight mtp + balance_weight balance + indexer_weight KL over all documents of a batch.

    lm and mtp: sum over documents / count over documents (0 where nothing is counted). Balance and KL: that quotient
    per layer, then summed over layers.
    """
    zero = parts[0].lm_sum.new_zeros(())

    def quotient(sums: list[Tensor], counts: list[int]) -> Tensor:
        return sum(sums, zero) / sum(counts) if sum(counts) else zero

    def over_layers(kind: str) -> Tensor:
        sums, counts = [getattr(p, f"{kind}_sum") for p in parts], [getattr(p, f"{kind}_count") for p in parts]
        names = sorted({name for by_layer in sums for name in by_layer})
        quotients = [quotient([s[n] for s in sums if n in s], [c[n] for c in counts if n in c]) for n in names]
        return sum(quotients, zero)

    return (
        quotient([p.lm_sum for p in parts], [p.lm_count for p in parts])
        + mtp_weight * quotient([p.mtp_sum for p in parts], [p.mtp_count for p in parts])
        + balance_weight * over_layers("balance")
        + indexer_weight * over_layers("indexer")
    )
