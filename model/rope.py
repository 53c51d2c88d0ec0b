"""Partial rotary position embedding: the last R channels, interleaved pairs, YaRN for layers with compression.

Source: R 2.3.3 and the released code (spec 1.1, 3.1). A layer with compression uses one table, of
`compress_rope_theta` and YaRN, for every rotation in it; other layers use `rope_theta` without YaRN.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.layers import at_least_fp32, rms_normalize


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """cos and sin of every pair's angle: [B, T, R/2] for tokens, [B, S, R/2] for blocks."""

    cos: Tensor
    sin: Tensor


def frequencies(config: ModelConfig, *, compressed: bool) -> Tensor:
    """Angle per position of each channel pair, fp32 [R/2], as the released code computes it."""
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if not compressed or config.rope_scaling is None:
        return inverse
    keep = _yarn_keep(config.rope_scaling, dim, theta)
    return inverse / config.rope_scaling.factor * (1 - keep) + inverse * keep


def _yarn_keep(scaling: RopeScaling, dim: int, theta: float) -> Tensor:
    """Share of the unscaled frequency per pair, fp32 [R/2]: 1 for fast pairs, 0 for slow, linear between."""

    def pair_with(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    width = high - low if high > low else 0.001
    return 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def rotation(frequency_R: Tensor, position: Tensor, dtype: torch.dtype) -> Rotation:
    """cos and sin at integer positions [B, T] in at least fp32 (`dtype`: the type of the island)."""
    angle = position.to(dtype).unsqueeze(-1) * frequency_R.to(device=position.device, dtype=dtype)
    return Rotation(cos=angle.cos(), sin=angle.sin())


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, turn: Rotation) -> Tensor:
    """RMSNorm over the last dim (without weight if None), then `rotate`; nothing is rounded to x's type between."""
    return rotate(rms_normalize(x, weight, eps), turn).to(x.dtype)


def rotate(x: Tensor, turn: Rotation, *, inverse: bool = False) -> Tensor:
    """Rotate the last R channels of x [B, T, C] or [B, T, H, C] by the position's angles.

    Layout: channels (C-R+2i, C-R+2i+1) are pair i. inverse: the conjugate rotation, used on attention outputs.
    Compute: in at least fp32, returned in x's type.
    """
    pairs = turn.cos.shape[-1]
    cos, sin = (turn.cos, turn.sin) if x.dim() == turn.cos.dim() else (turn.cos.unsqueeze(-2), turn.sin.unsqueeze(-2))
    sin = -sin if inverse else sin
    still, turned = x.split([x.shape[-1] - 2 * pairs, 2 * pairs], dim=-1)
    even, odd = at_least_fp32(turned).unflatten(-1, (pairs, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((still, turned.to(x.dtype)), dim=-1)
