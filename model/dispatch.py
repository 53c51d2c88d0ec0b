"""Token order for the experts on one process: sort the token-expert pairs, and put the results back.

This is the seam for expert parallelism: `trainer/parallel/expert.py` will replace `LocalDispatcher`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.layers import at_least_fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatched:
    """Pairs sorted by expert, in token order inside an expert: x_PD, weight_P, rows per expert, and the order."""

    x_PD: Tensor
    weight_P: Tensor
    counts: list[int]
    order_P: Tensor


class LocalDispatcher:
    """All experts are here. Both directions are permutations, so no backward pass adds in an undefined order."""

    def dispatch(self, x_BTD: Tensor, expert_BTK: Tensor, weight_BTK: Tensor, experts: int) -> Dispatched:
        """Sort the B*T*K pairs by expert, stably."""
        K = expert_BTK.shape[-1]
        order_P = torch.sort(expert_BTK.flatten(), stable=True).indices
        pairs_PD = x_BTD.flatten(0, 1).unsqueeze(1).expand(-1, K, -1).flatten(0, 1)
        return Dispatched(
            x_PD=pairs_PD.index_select(0, order_P),
            weight_P=weight_BTK.flatten().index_select(0, order_P),
            counts=torch.bincount(expert_BTK.flatten(), minlength=experts).tolist(),
            order_P=order_P,
        )

    def combine(self, y_PD: Tensor, dispatched: Dispatched, shape: torch.Size) -> Tensor:
        """Sum of each token's K results in at least fp32, in the order the router chose them.

        `shape` is that of expert_BTK. The result stays promoted.
        """
        back_P = torch.argsort(dispatched.order_P)
        return at_least_fp32(y_PD.index_select(0, back_P)).unflatten(0, shape).sum(2)
