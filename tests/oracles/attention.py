"""Oracle: the three kinds of attention layer, one softmax per token and head. Source: fact sheet sections 3.1-3.6."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tests.oracles.basic import part, rms, rope_frequency, rotate
from tests.oracles.compression import CSA_RATIO, compress, index_scores, top_blocks, visible_blocks

Stage = Literal["dense", "sparse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """What one layer did with its compressed blocks; the indexer's fields are None outside CSA layers.

    attention_HTS: attention probability of each block (its share of window, blocks and sink together), 0 where it was
    not attended; no gradient.
    index_score_TS: the indexer's scores, with the gradient of the indexer's parameters only.
    index_topk: per token the selected visible blocks, ascending.
    """

    visible_TS: Tensor
    attention_HTS: Tensor
    index_score_TS: Tensor | None
    index_topk: list[list[int]] | None


def attend(
    h_TD: Tensor, ratio: int, weights: Mapping[str, Tensor], config: Mapping, stage: Stage
) -> tuple[Tensor, Blocks]:
    """Attention output [T, D] of one document, and what happened to the compressed blocks."""
    tokens, heads, channels = len(h_TD), config["num_attention_heads"], config["head_dim"]
    eps, frequency_P = config["rms_norm_eps"], rope_frequency(config, ratio)
    position_T = torch.arange(tokens)
    qr_TQ = rms(h_TD @ weights["wq_a.weight"].T, eps) * weights["q_norm.weight"]
    query_THC = rms((qr_TQ @ weights["wq_b.weight"].T).reshape(tokens, heads, channels), eps)
    query_THC = rotate(query_THC, position_T, frequency_P)
    entry_TC = rms(h_TD @ weights["wkv.weight"].T, eps) * weights["kv_norm.weight"]
    entry_TC = rotate(entry_TC, position_T, frequency_P)

    block_SC = h_TD.new_zeros(0, channels)
    visible_TS = torch.zeros(tokens, 0, dtype=torch.bool)
    score_TS, topk = None, None
    if ratio:
        block_SC = compress(h_TD, ratio, part(weights, "compressor."), config, frequency_P)
        visible_TS = visible_blocks(tokens, ratio)
    if ratio == CSA_RATIO:
        score_TS = index_scores(h_TD.detach(), qr_TQ.detach(), part(weights, "indexer."), config, frequency_P)
        topk = top_blocks(score_TS, visible_TS, config["index_topk"])

    outputs, attention_HTS = [], h_TD.new_zeros(heads, tokens, len(block_SC))
    for t in range(tokens):
        window = list(range(max(0, t - config["sliding_window"] + 1), t + 1))
        blocks = [s for s in range(len(block_SC)) if visible_TS[t, s]]
        if topk is not None and stage == "sparse":
            blocks = topk[t]
        key_XC = torch.cat([entry_TC[window], block_SC[blocks]])
        logit_HX = query_THC[t] @ key_XC.T / math.sqrt(channels)
        with_sink = torch.softmax(torch.cat([logit_HX, weights["attn_sink"][:, None]], dim=1), dim=1)
        share_HX = with_sink[:, :-1]
        outputs.append(share_HX @ key_XC)
        attention_HTS[:, t, blocks] = share_HX[:, len(window) :].detach()
    output_THC = rotate(torch.stack(outputs), -position_T, frequency_P)
    blocks_record = Blocks(visible_TS=visible_TS, attention_HTS=attention_HTS, index_score_TS=score_TS, index_topk=topk)
    return project_output(output_THC, weights, config), blocks_record


def project_output(output_THC: Tensor, weights: Mapping[str, Tensor], config: Mapping) -> Tensor:
    """wo_b . concat over groups g of (wo_a[g] . the heads of group g, which are neighbours)."""
    groups, width = config["o_groups"], config["o_lora_rank"]
    per_group = config["num_attention_heads"] // groups
    narrowed = []
    for g in range(groups):
        heads_TX = output_THC[:, g * per_group : (g + 1) * per_group].flatten(1)
        narrowed.append(heads_TX @ weights["wo_a.weight"][g * width : (g + 1) * width].T)
    return torch.cat(narrowed, dim=1) @ weights["wo_b.weight"].T
