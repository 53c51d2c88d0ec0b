"""The mixture of experts of one layer: router, routed experts, shared expert, balance loss (R 2.1; spec 4.1-4.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.dispatch import Dispatcher, LocalDispatcher
from model.experts import Experts, SharedExpert
from model.router import Gate, Route


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStatistics:
    """Of one layer. load_E: int64 counted tokens per expert. balance_sum: see `balance_sum`; None in hash layers.

    entropy_sum: sum over counted tokens of the entropy of the normalised scores, in nats, without gradient.
    """

    load_E: Tensor
    balance_sum: Tensor | None
    entropy_sum: Tensor


def balance_sum(score_BTE: Tensor, document_BT: Tensor, K: int) -> Tensor:
    """sum over documents d of T_d * sum_i f_i P_i, a scalar; divided by all counted tokens it is the balance loss.

    Source: V3 2.1.2 (sequence-wise balance loss), per document instead of per row (R 3.4.3; spec 4.3). Math: f_i =
    E / (K T_d) * number of d's tokens with i among the K highest scores (without bias), P_i = mean over d's tokens of
    s_i / sum_j s_j. Weighing documents by their length makes a row of one document V3's own loss. Padding has id -1.
    """
    E = score_BTE.shape[-1]
    counted_BT = document_BT >= 0
    documents = document_BT.shape[1]
    row_B1 = torch.arange(document_BT.shape[0], device=document_BT.device).unsqueeze(1)
    slot_P = (row_B1 * documents + document_BT.clamp_min(0)).flatten()
    top_BTK = score_BTE.detach().topk(K, dim=-1).indices
    chosen_BTE = torch.zeros_like(score_BTE).scatter(-1, top_BTK, 1.0) * counted_BT.unsqueeze(-1)
    slots = document_BT.numel()
    count_GE = score_BTE.new_zeros(slots, E).index_add(0, slot_P, chosen_BTE.detach().flatten(0, 1))
    length_G = score_BTE.new_zeros(slots).index_add(0, slot_P, counted_BT.flatten().to(score_BTE.dtype))
    factor_GE = count_GE * (E / (K * length_G.clamp_min(1))).unsqueeze(-1)
    share_PE = (score_BTE / score_BTE.sum(-1, keepdim=True)).flatten(0, 1)
    per_token_P = (share_PE * factor_GE.index_select(0, slot_P)).sum(-1)
    return (per_token_P * counted_BT.flatten()).sum()


class MoE(nn.Module):
    """gate, experts, shared_experts. `dispatcher` is the seam for expert parallelism; held: experts that are here."""

    def __init__(self, config: ModelConfig, *, hashed: bool, dtype: torch.dtype, held: range) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.moe_intermediate_size, config.swiglu_limit, dtype)
        self.gate = Gate(config, hashed=hashed, dtype=dtype)
        self.experts = Experts(held, *sizes)
        self.shared_experts = SharedExpert(*sizes)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, h_BTD: Tensor, token_BT: Tensor, document_BT: Tensor) -> tuple[Tensor, RouterStatistics]:
        route = self.gate(h_BTD, token_BT)
        sent = self.dispatcher.dispatch(h_BTD, route.expert_BTK, route.weight_BTK, route.score_BTE.shape[-1])
        y_PD = self.experts(sent.x_PD, sent.weight_P, sent.counts)
        y_BTD = self.dispatcher.combine(y_PD, sent, route.expert_BTK.shape)
        y_BTD = (y_BTD + self.shared_experts(h_BTD)).to(h_BTD.dtype)
        return y_BTD, self._statistics(route, document_BT)

    def _statistics(self, route: Route, document_BT: Tensor) -> RouterStatistics:
        counted_BT = document_BT >= 0
        expert_BTK, score_BTE = route.expert_BTK, route.score_BTE
        load_E = torch.bincount(expert_BTK[counted_BT].flatten(), minlength=score_BTE.shape[-1])
        share_BTE = score_BTE.detach() / score_BTE.detach().sum(-1, keepdim=True)
        entropy_BT = -torch.xlogy(share_BTE, share_BTE).sum(-1)
        hashed = self.gate.hashed
        balance = None if hashed else balance_sum(score_BTE, document_BT, expert_BTK.shape[-1])
        return RouterStatistics(load_E=load_E, balance_sum=balance, entropy_sum=(entropy_BT * counted_BT).sum())
