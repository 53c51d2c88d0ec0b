"""Oracle: the whole DeepSeek-V4 model for one document, slow and obvious, in float64.

It imports nothing of the project and shares no code with it: it was written from the specification alone, so that
agreement of the two means something. One document at a time: no packing, padding or masks. Differentiable.
Source: fact sheet sections 1-4; report section 2; MTP as in the V3 report section 2.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.attention import Blocks, Stage, attend
from tests.oracles.basic import part, rms, upcast
from tests.oracles.mixture import mixture
from tests.oracles.streams import collapse, residual_site


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What one block did: its streams afterwards [T, N, D], its compressed blocks and its routing.

    router_index_TK: chosen experts, ascending. router_score_TE: sqrt(softplus(logit)), with gradient.
    hashed: whether the experts came from `tid2eid`.
    """

    streams_TND: Tensor
    blocks: Blocks
    router_index_TK: Tensor
    router_score_TE: Tensor
    hashed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Everything the tests compare, for one document of T tokens; all floating tensors in float64.

    layers: "0", "1", ... and, where the MTP block ran (T >= 2), "mtp", whose T is T - 1.
    mtp_logits_TV: [T - 1, V], row t predicts token t + 2. stage: which blocks the CSA layers attended.
    """

    logits_TV: Tensor
    mtp_logits_TV: Tensor
    last_hidden_TD: Tensor
    layers: dict[str, Layer]
    stage: Stage


def forward(config: Mapping, weights: Mapping[str, Tensor], ids: list[int], attention: Stage = "sparse") -> Result:
    """The model on one document: `config` as in config.json, `weights` under their released names, in any precision.

    attention: "sparse" is the released behaviour (the indexer's top-k); "dense" attends every visible block in CSA
    layers too.
    """
    weights = upcast(weights)
    embedding_TD = weights["embed.weight"][ids]
    streams_TND = torch.stack([embedding_TD] * config["hc_mult"], dim=1)
    layers = {}
    for i in range(config["num_hidden_layers"]):
        layers[str(i)] = block(
            streams_TND, ids, config["compress_ratios"][i], part(weights, f"layers.{i}."), config, attention
        )
        streams_TND = layers[str(i)].streams_TND
    last_hidden_TD = hidden_before_head(streams_TND, weights, config)
    mtp_logits_TV = last_hidden_TD.new_zeros(0, config["vocab_size"])
    if config["num_nextn_predict_layers"] and len(ids) >= 2:
        mtp = part(weights, "mtp.0.")
        input_TND = mtp_input(streams_TND[:-1], embedding_TD[1:], mtp, config)
        layers["mtp"] = block(input_TND, ids[1:], config["compress_ratios"][-1], mtp, config, attention)
        mtp_logits_TV = hidden_before_head(layers["mtp"].streams_TND, mtp, config) @ weights["head.weight"].T
    return Result(
        logits_TV=last_hidden_TD @ weights["head.weight"].T,
        mtp_logits_TV=mtp_logits_TV,
        last_hidden_TD=last_hidden_TD,
        layers=layers,
        stage=attention,
    )


def block(
    streams_TND: Tensor, ids: list[int], ratio: int, weights: Mapping[str, Tensor], config: Mapping, attention: Stage
) -> Layer:
    """One block: an mHC site around attention, then one around the experts."""
    eps, seen = config["rms_norm_eps"], {}

    def attention_part(u_TD: Tensor) -> Tensor:
        h_TD = rms(u_TD, eps) * weights["attn_norm.weight"]
        output_TD, seen["blocks"] = attend(h_TD, ratio, part(weights, "attn."), config, attention)
        return output_TD

    def expert_part(u_TD: Tensor) -> Tensor:
        h_TD = rms(u_TD, eps) * weights["ffn_norm.weight"]
        output_TD, seen["index"], seen["score"] = mixture(h_TD, ids, part(weights, "ffn."), config)
        return output_TD

    streams_TND = residual_site(streams_TND, part(weights, "hc_attn_"), config, attention_part)
    streams_TND = residual_site(streams_TND, part(weights, "hc_ffn_"), config, expert_part)
    return Layer(
        streams_TND=streams_TND,
        blocks=seen["blocks"],
        router_index_TK=seen["index"],
        router_score_TE=seen["score"],
        hashed="ffn.gate.tid2eid" in weights,
    )


def mtp_input(streams_TND: Tensor, next_TD: Tensor, mtp: Mapping[str, Tensor], config: Mapping) -> Tensor:
    """X'_k = e_proj(RMSNorm(embedding of the next token)) + h_proj(RMSNorm(X_k)) for each stream k."""
    eps = config["rms_norm_eps"]
    from_token_TD = (rms(next_TD, eps) * mtp["enorm.weight"]) @ mtp["e_proj.weight"].T
    new_streams = []
    for k in range(streams_TND.shape[1]):
        from_stream_TD = (rms(streams_TND[:, k], eps) * mtp["hnorm.weight"]) @ mtp["h_proj.weight"].T
        new_streams.append(from_token_TD + from_stream_TD)
    return torch.stack(new_streams, dim=1)


def hidden_before_head(streams_TND: Tensor, weights: Mapping[str, Tensor], config: Mapping) -> Tensor:
    """Collapsed streams after the final norm [T, D]; `weights` are the model's or the MTP block's own."""
    collapsed_TD = collapse(streams_TND, part(weights, "hc_head_"), config)
    return rms(collapsed_TD, config["rms_norm_eps"]) * weights["norm.weight"]
