"""Token order for the experts on one process: sort the token-expert pairs, and put the results back.

This is the seam for expert parallelism: `trainer/parallel/expert.py` has another `Dispatcher`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.gather import take
from model.layers import at_least_fp32


class Dispatcher(Protocol):
    """Brings tokens to the experts and results back; see `LocalDispatcher`, whose arguments and results these are.

    What `dispatch` returns has x_PD, weight_P and counts, for `Experts`; `combine` gets it back.
    """

    def dispatch(self, x_BTD: Tensor, expert_BTK: Tensor, weight_BTK: Tensor, experts: int) -> Any: ...

    def combine(self, y_PD: Tensor, dispatched: Any, shape: torch.Size) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatched:
    """Pairs sorted by expert, in token order inside an expert: x_PD, weight_P, rows per expert.

    order_P: the pair (token-major) at each sorted place; back_P: its inverse.
    """

    x_PD: Tensor
    weight_P: Tensor
    counts: list[int]
    order_P: Tensor
    back_P: Tensor


class LocalDispatcher:
    """All experts are here. Both directions are permutations, so no backward pass adds in an undefined order."""

    def dispatch(self, x_BTD: Tensor, expert_BTK: Tensor, weight_BTK: Tensor, experts: int) -> Dispatched:
        """Sort the B*T*K pairs by expert, stably."""
        K = expert_BTK.shape[-1]
        order_P = torch.sort(expert_BTK.flatten(), stable=True).indices
        back_P = torch.argsort(order_P)
        pairs_PD = x_BTD.flatten(0, 1).unsqueeze(1).expand(-1, K, -1).flatten(0, 1)
        return Dispatched(
            x_PD=take(pairs_PD, order_P, back_P),
            weight_P=take(weight_BTK.flatten(), order_P, back_P),
            counts=torch.bincount(expert_BTK.flatten(), minlength=experts).tolist(),
            order_P=order_P,
            back_P=back_P,
        )

    def combine(self, y_PD: Tensor, dispatched: Dispatched, shape: torch.Size) -> Tensor:
        """Sum of each token's K results in at least fp32, in the order the router chose them.

        `shape` is that of expert_BTK. The result stays promoted.
        """
        pairs_PD = take(y_PD, dispatched.back_P, dispatched.order_P)
        return at_least_fp32(pairs_PD).unflatten(0, shape).sum(2)
