"""Oracle: router, hash routing and experts, token by token. Source: fact sheet sections 4.1 and 4.2."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from tests.oracles.basic import part


def route(h_TD: Tensor, ids: list[int], gate: Mapping[str, Tensor], config: Mapping) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, K] (ascending) and scores [T, E] = sqrt(softplus(W_g h)).

    Learned layers (those with a `bias`): the K highest of score + bias, of equal ones the lower expert. Hash layers:
    the token's row of `tid2eid`.
    """
    score_TE = torch.sqrt(functional.softplus(h_TD @ gate["weight"].T))
    chosen = []
    for token, score_E in zip(ids, score_TE, strict=True):
        if "tid2eid" in gate:
            experts = gate["tid2eid"][token].tolist()
        else:
            key = (score_E + gate["bias"]).tolist()
            experts = sorted(range(len(key)), key=lambda e: (-key[e], e))[: config["num_experts_per_tok"]]
        chosen.append(sorted(experts))
    index_TK = torch.tensor(chosen, dtype=torch.int64).reshape(len(ids), config["num_experts_per_tok"])
    return index_TK, score_TE


def expert(h_D: Tensor, weights: Mapping[str, Tensor], routing_weight: Tensor | float, limit: float) -> Tensor:
    """w2( routing_weight * silu(min(w1 h, limit)) * clamp(w3 h, -limit, limit) ) for one token [D]."""
    gate_F = functional.silu((weights["w1.weight"] @ h_D).clamp(max=limit))
    up_F = (weights["w3.weight"] @ h_D).clamp(-limit, limit)
    return weights["w2.weight"] @ (routing_weight * gate_F * up_F)


def mixture(
    h_TD: Tensor, ids: list[int], weights: Mapping[str, Tensor], config: Mapping
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, D] of routed and shared experts, the chosen experts [T, K] and the scores [T, E]."""
    index_TK, score_TE = route(h_TD, ids, part(weights, "gate."), config)
    experts = [part(weights, f"experts.{e}.") for e in range(config["n_routed_experts"])]
    shared, limit = part(weights, "shared_experts."), config["swiglu_limit"]
    outputs = []
    for t, h_D in enumerate(h_TD):
        chosen = index_TK[t].tolist()
        total = score_TE[t, chosen].sum()
        output_D = expert(h_D, shared, 1.0, limit)
        for e in chosen:
            weight = config["routed_scaling_factor"] * score_TE[t, e] / total
            output_D = output_D + expert(h_D, experts[e], weight, limit)
        outputs.append(output_D)
    return torch.stack(outputs), index_TK, score_TE
