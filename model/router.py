"""The router: which K experts a token goes to and with what weight, and the bias rule that balances them.

Source: V3 2.1.2, R 2.1 (spec 4.1, 4.3). Scores are sqrt(softplus(logit)), an fp32 island. Learned layers choose the
K largest of score + bias; hash layers look the experts up by token id. Weights never see the bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.layers import fp32_product, island_dtype

GUARD = 1e-20
"""Added to the sum of the chosen scores, as in the released training kernels."""

LEAST_LOGIT = -80.0
"""Lower logits count as this one, of score 4e-18: below -104 softplus is 0 in fp32, and the root's slope there NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """expert_BTK: chosen experts (int64); weight_BTK: their weights; score_BTE: all scores, both in at least fp32."""

    expert_BTK: Tensor
    weight_BTK: Tensor
    score_BTE: Tensor


def scores(logit_BTE: Tensor) -> Tensor:
    """s = sqrt(softplus(l)); softplus is the identity above 20."""
    return F.softplus(logit_BTE.clamp_min(LEAST_LOGIT)).sqrt()


def route(score_BTE: Tensor, expert_BTK: Tensor, scaling: float) -> Tensor:
    """weight_BTK = scaling * s_k / sum over the chosen of s."""
    chosen_BTK = score_BTE.gather(-1, expert_BTK)
    return scaling * chosen_BTK / (chosen_BTK.sum(-1, keepdim=True) + GUARD)


def update_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """b_i += speed * sign(mean load - load_i), in place (V3 2.1.2). load_E: int64 tokens of one whole step."""
    above = load_E.sum() - load_E * load_E.numel()
    bias_E.add_(above.sign().to(bias_E.dtype), alpha=speed)


class Gate(nn.Module):
    """weight [E, D] and, by layer kind, the buffer bias [E] (learned) or tid2eid [V, K] (hash)."""

    bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: ModelConfig, *, hashed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.hashed = config, hashed
        E, K = config.n_routed_experts, config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size, dtype=dtype))
        if hashed:
            self.register_buffer("tid2eid", torch.empty(config.vocab_size, K, dtype=torch.int64))
        else:
            self.register_buffer("bias", torch.empty(E, dtype=island_dtype(dtype)))

    def forward(self, h_BTD: Tensor, token_BT: Tensor) -> Route:
        score_BTE = scores(fp32_product(h_BTD, self.weight))
        expert_BTK = self._choose(score_BTE.detach(), token_BT)
        weight_BTK = route(score_BTE, expert_BTK, self.config.routed_scaling_factor)
        return Route(expert_BTK=expert_BTK, weight_BTK=weight_BTK, score_BTE=score_BTE)

    def _choose(self, score_BTE: Tensor, token_BT: Tensor) -> Tensor:
        if self.hashed:
            return self.tid2eid[token_BT]
        return torch.topk(score_BTE + self.bias, self.config.num_experts_per_tok, dim=-1).indices
