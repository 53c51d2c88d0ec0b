"""Oracle: manifold-constrained hyper-connections (mHC). Source: fact sheet section 2; report section 2.2.

`comb_TNN` is indexed [token, from stream j, to stream k], as the released code stores it: X'_k takes comb[j, k] * X_j.
The report's matrix B is its transpose.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.oracles.basic import rms


def mixing_numbers(streams_TND: Tensor, fn: Tensor, config: Mapping) -> Tensor:
    """fn applied to the flattened streams after the weightless RMSNorm (the norm's factor commutes with fn)."""
    return rms(streams_TND.flatten(1), config["rms_norm_eps"]) @ fn.T


def sinkhorn(logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """Softmax over the last axis, then alternately normalise first and last axis, ending with the first."""
    comb_TNN = torch.softmax(logits_TNN, dim=2) + eps
    comb_TNN = comb_TNN / (comb_TNN.sum(dim=1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb_TNN = comb_TNN / (comb_TNN.sum(dim=2, keepdim=True) + eps)
        comb_TNN = comb_TNN / (comb_TNN.sum(dim=1, keepdim=True) + eps)
    return comb_TNN


def coefficients(streams_TND: Tensor, site: Mapping[str, Tensor], config: Mapping) -> tuple[Tensor, Tensor, Tensor]:
    """pre [T, N], post [T, N], comb [T, N, N] of one site from its `fn`, `base`, `scale` = (pre, post, comb)."""
    tokens, count, _ = streams_TND.shape
    mix_TX, base, scale = mixing_numbers(streams_TND, site["fn"], config), site["base"], site["scale"]
    pre, post, rest = slice(0, count), slice(count, 2 * count), slice(2 * count, None)
    pre_TN = torch.sigmoid(scale[0] * mix_TX[:, pre] + base[pre]) + config["hc_eps"]
    post_TN = 2 * torch.sigmoid(scale[1] * mix_TX[:, post] + base[post])
    logits_TNN = (scale[2] * mix_TX[:, rest] + base[rest]).reshape(tokens, count, count)
    return pre_TN, post_TN, sinkhorn(logits_TNN, config["hc_sinkhorn_iters"], config["hc_eps"])


def residual_site(
    streams_TND: Tensor, site: Mapping[str, Tensor], config: Mapping, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """X'_k = post_k F(sum_k pre_k X_k) + sum_j comb_jk X_j, stream by stream."""
    pre_TN, post_TN, comb_TNN = coefficients(streams_TND, site, config)
    count = streams_TND.shape[1]
    input_TD = sum(pre_TN[:, k, None] * streams_TND[:, k] for k in range(count))
    output_TD = function(input_TD)
    new_streams = []
    for k in range(count):
        carried_TD = sum(comb_TNN[:, j, k, None] * streams_TND[:, j] for j in range(count))
        new_streams.append(post_TN[:, k, None] * output_TD + carried_TD)
    return torch.stack(new_streams, dim=1)


def collapse(streams_TND: Tensor, site: Mapping[str, Tensor], config: Mapping) -> Tensor:
    """The head's mHC site, which has the `pre` part only: sum_k (sigmoid(scale mix_k + base_k) + eps) X_k."""
    mix_TN = mixing_numbers(streams_TND, site["fn"], config)
    pre_TN = torch.sigmoid(site["scale"][0] * mix_TN + site["base"]) + config["hc_eps"]
    return sum(pre_TN[:, k, None] * streams_TND[:, k] for k in range(streams_TND.shape[1]))
