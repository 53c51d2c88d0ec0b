"""Oracle: compressed KV entries (CSA, HCA) and the lightning indexer. Source: fact sheet sections 3.2-3.5.

Block s covers the tokens ratio*s .. ratio*s + ratio - 1 of the document; a trailing part block does not exist.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.oracles.basic import part, rms, rotate

CSA_RATIO = 4
"""The ratio with overlapping blocks and an indexer; any other ratio but 0 is HCA."""


def visible_blocks(tokens: int, ratio: int) -> Tensor:
    """Boolean [T, S]: block s is visible to query t iff its last token is at or before t."""
    blocks = tokens // ratio
    visible_TS = torch.zeros(tokens, blocks, dtype=torch.bool)
    for t in range(tokens):
        for s in range(blocks):
            visible_TS[t, s] = ratio * s + ratio - 1 <= t
    return visible_TS


def compress(h_TD: Tensor, ratio: int, weights: Mapping[str, Tensor], config: Mapping, frequency_P: Tensor) -> Tensor:
    """Compressed entries [S, C] from `wkv`, `wgate`, `ape`, `norm`: per channel a softmax-weighted mean of token rows.

    CSA: the rows of a block are the previous block's tokens through the first half of the projections and its own
    tokens through the second half (block 0 has only its own). HCA: its own tokens.
    """
    value_TX, logit_TX = h_TD @ weights["wkv.weight"].T, h_TD @ weights["wgate.weight"].T
    ape, channels = weights["ape"], len(weights["norm.weight"])
    entries = []
    for s in range(len(h_TD) // ratio):
        own, before = slice(ratio * s, ratio * (s + 1)), slice(ratio * (s - 1), ratio * s)
        if ratio == CSA_RATIO:
            values, logits = [value_TX[own, channels:]], [logit_TX[own, channels:] + ape[:, channels:]]
            if s > 0:
                values.append(value_TX[before, :channels])
                logits.append(logit_TX[before, :channels] + ape[:, :channels])
        else:
            values, logits = [value_TX[own]], [logit_TX[own] + ape]
        share_XC = torch.softmax(torch.cat(logits), dim=0)
        entries.append((share_XC * torch.cat(values)).sum(dim=0))
    mean_SC = torch.stack(entries) if entries else h_TD.new_zeros(0, channels)
    entry_SC = rms(mean_SC, config["rms_norm_eps"]) * weights["norm.weight"]
    return rotate(entry_SC, ratio * torch.arange(len(entry_SC)), frequency_P)


def index_scores(
    h_TD: Tensor, qr_TQ: Tensor, weights: Mapping[str, Tensor], config: Mapping, frequency_P: Tensor
) -> Tensor:
    """I_ts = sum_h w_th relu(q_th . k_s) for every block [T, S], visible or not.

    The Hadamard rotation of q and k is left out: it is orthogonal and cancels in q . k.
    """
    heads, channels = config["index_n_heads"], config["index_head_dim"]
    tokens = len(h_TD)
    key_SC = compress(h_TD, CSA_RATIO, part(weights, "compressor."), config, frequency_P)
    query_THC = (qr_TQ @ weights["wq_b.weight"].T).reshape(tokens, heads, channels)
    query_THC = rotate(query_THC, torch.arange(tokens), frequency_P)
    weight_TH = (h_TD @ weights["weights_proj.weight"].T) / math.sqrt(channels) / math.sqrt(heads)
    score_TS = h_TD.new_zeros(tokens, len(key_SC))
    for head in range(heads):
        score_TS = score_TS + weight_TH[:, head, None] * torch.relu(query_THC[:, head] @ key_SC.T)
    return score_TS


def top_blocks(score_TS: Tensor, visible_TS: Tensor, count: int) -> list[list[int]]:
    """Per token the `count` visible blocks of highest score (fewer where fewer are visible), in ascending order.

    Of equal scores the earlier block wins.
    """
    chosen = []
    for score_S, visible_S in zip(score_TS.tolist(), visible_TS.tolist(), strict=True):
        candidates = [s for s in range(len(score_S)) if visible_S[s]]
        ranked = sorted(candidates, key=lambda s: (-score_S[s], s))
        chosen.append(sorted(ranked[:count]))
    return chosen
