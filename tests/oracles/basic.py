"""Oracle: weight lookup, RMSNorm and rotary embedding in float64.

Source: fact sheet sections 1.1 (RoPE, YaRN) and 3.1; report section 2. Shape letters as in the rest of the project:
T position, D hidden, N stream, H head, C head channel, Q query-latent channel, S block, E expert, K chosen expert,
F expert channel, V vocabulary, P rotated pair; X stands for any further axes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def upcast(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every floating tensor in float64, differentiably; integer tables unchanged."""
    return {name: value.double() if value.is_floating_point() else value for name, value in weights.items()}


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose name begins with `prefix`, under the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def rms(x_XC: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a weight."""
    return x_XC / torch.sqrt((x_XC * x_XC).mean(-1, keepdim=True) + eps)


def rope_frequency(config: Mapping, ratio: int) -> Tensor:
    """Radians per position of each rotated pair [P], P = qk_rope_head_dim / 2, in float64.

    The numbers themselves are float32 numbers, computed in float32 as the released code does: at position 1e6 the
    rounding is a visible part of the model. Window-only layers (ratio 0): rope_theta, no YaRN. All others:
    compress_rope_theta and, where `rope_scaling` is given, YaRN without mscale.
    """
    channels = config["qk_rope_head_dim"]
    base = config["compress_rope_theta"] if ratio else config["rope_theta"]
    frequency_P = 1.0 / (base ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels))
    scaling = config["rope_scaling"]
    if ratio and scaling is not None:
        keep_P = 1 - yarn_ramp(scaling, base, channels)
        frequency_P = frequency_P / scaling["factor"] * (1 - keep_P) + frequency_P * keep_P
    return frequency_P.double()


def yarn_ramp(scaling: Mapping, base: float, channels: int) -> Tensor:
    """0 where a frequency is kept, 1 where it is divided by the factor, linear in the pair index between [P], fp32."""

    def pair_turning(times: float) -> float:
        """The (fractional) pair index whose wave turns `times` times within the original length."""
        length = scaling["original_max_position_embeddings"]
        return channels * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(pair_turning(scaling["beta_fast"])), 0)
    last = min(math.ceil(pair_turning(scaling["beta_slow"])), channels - 1)
    span = last - first if last != first else 0.001
    return ((torch.arange(channels // 2, dtype=torch.float32) - first) / span).clamp(0, 1)


def rotate(x_TXC: Tensor, position_T: Tensor, frequency_P: Tensor) -> Tensor:
    """RoPE on the last 2P channels: the adjacent pair (2p, 2p+1) turns by position * frequency_P[p].

    A negative position is the inverse rotation. The channels before the last 2P stay as they are.
    """
    pairs = len(frequency_P)
    still, turned = x_TXC[..., : -2 * pairs], x_TXC[..., -2 * pairs :]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    angle_TP = position_T.double()[:, None] * frequency_P[None, :]
    angle = angle_TP.reshape(len(position_T), *[1] * (x_TXC.dim() - 2), pairs)
    new_even = even * torch.cos(angle) - odd * torch.sin(angle)
    new_odd = even * torch.sin(angle) + odd * torch.cos(angle)
    return torch.cat([still, torch.stack([new_even, new_odd], dim=-1).flatten(-2)], dim=-1)
