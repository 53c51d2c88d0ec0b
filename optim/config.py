"""Optimizer configuration. Defaults are the V4 report's (section 2.4, 4.2.2); those marked "ours" are unpublished."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonConfig:
    """Muon (R Algorithm 1): plain momentum accumulation, Nesterov, hybrid Newton-Schulz, update RMS."""

    momentum: float = 0.95
    weight_decay: float = 0.1
    update_rms: float = 0.18

    def __post_init__(self) -> None:
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(self.update_rms > 0, "update_rms", self.update_rms, "a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig:
    """AdamW for embedding, head, norms and the static mHC parameters (R 2.4)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    weight_decay: float = 0.1
    """Applied to embedding and head only; vectors get none (ours: V4 does not say)."""

    def __post_init__(self) -> None:
        _require(0 <= self.beta1 < 1, "beta1", self.beta1, "in [0, 1)")
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "in [0, 1)")
        _require(self.eps > 0, "eps", self.eps, "a positive number")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Both optimizers, the global clip, and per parameter group (the parts of the model) rate scale and freezing."""

    muon: MuonConfig = field(default_factory=MuonConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down (V3's value; V4 does not say)."""
    rate_scale: dict[str, float] = field(default_factory=dict)
    """Multiplier of the learning rate by parameter group, 1 where not named."""
    freeze: tuple[str, ...] = ()
    """Parameter groups that are never updated."""

    def __post_init__(self) -> None:
        _require(self.clip_norm > 0, "clip_norm", self.clip_norm, "a positive norm")
        for group, scale in self.rate_scale.items():
            _require(scale >= 0, f"rate_scale.{group}", scale, "at least 0")


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key} = {value}: expected {expected}")
