"""The precision section of a run: the type of the model, and the rules that give parameters FP8 and FP4 formats."""

from dataclasses import dataclass, field
from typing import Literal

from model.config import require
from trainer.precision.elements import FLOORS, Format, named

Precision = Literal["fp64", "fp32", "bf16"]
BackEnd = Literal["auto", "emulated", "torch", "te"]
THEN = ">"
"""Between the formats that a weight is rounded to one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleConfig:
    """The formats of some parameters and of the operands of their three products; "" is the run's type.

    y = x W^T takes `input` and `weight`; the gradient of x takes `grad` and `dgrad_weight`; that of W takes
    `wgrad_grad` and `wgrad_input`. `dgrad_weight` and `wgrad_input` are made from what `weight` and `input` left. A
    later rule stands above an earlier one.
    """

    parameters: tuple[str, ...]
    """Names, with * for any characters: layers.*.attn.wq_a.weight, *.ffn.experts.w?."""
    weight: str = ""
    """One format, or two as in e2m1_1x32>e4m3_128x128: rounded to the first, then, without a floor, to the second."""
    input: str = ""
    grad: str = ""
    dgrad_weight: str = ""
    """ "": what `weight` left, as it is."""
    wgrad_input: str = ""
    wgrad_grad: str = ""
    from_tokens: int = 0
    """Steps that begin after so many tokens; before, the rule is not there."""

    def __post_init__(self) -> None:
        require(bool(self.parameters), "parameters", list(self.parameters), "at least one name")
        require(self.from_tokens >= 0, "from_tokens", self.from_tokens, "at least 0 tokens")
        for name in self.weight.split(THEN) if self.weight else ():
            _format("weight", name)
        if self.dgrad_weight:
            _format("dgrad_weight", self.dgrad_weight)
        require(self.weight.count(THEN) <= 1, "weight", self.weight, "one format, or two as in e2m1_1x32>e4m3_128x128")
        for key in ("input", "grad", "wgrad_input", "wgrad_grad"):
            name = getattr(self, key)
            if name:
                rows, columns = _format(key, name).block
                along = columns if key.startswith("wgrad") else rows
                said = "a column" if key.startswith("wgrad") else "a row, or a scale would tell of later tokens"
                require(along == 1, key, name, f"a block within {said}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingConfig:
    """The format of what attention looks at, not of a parameter; "" is the run's type."""

    format: str = ""
    from_tokens: int = 0
    """Steps that begin after so many tokens; before, nothing is rounded."""

    def __post_init__(self) -> None:
        require(self.from_tokens >= 0, "from_tokens", self.from_tokens, "at least 0 tokens")
        if self.format:
            rows = _format("format", self.format).block[0]
            require(rows == 1, "format", self.format, "a block within a row, or a scale would tell of later tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """The type of weights and activations; fp32 islands and fp32 masters are kept whatever it is.

    A weight with a format keeps the format's numbers in the run's type, which holds them exactly.
    """

    dtype: Precision = "bf16"
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    """By a name of ours, in order; every parameter has the last rule that names it (docs/precision.md)."""
    index: RoundingConfig = field(default_factory=RoundingConfig)
    """The indexer's q and k, after the Hadamard rotation; V4's: e2m1_1x32."""
    entries: RoundingConfig = field(default_factory=RoundingConfig)
    """The window's keys and compressed entries, but for their rotated channels; V4's: e4m3_1x64."""
    backend: BackEnd = "auto"
    """What multiplies numbers with formats; auto: the fastest that this device has and that meets the rules exactly."""
    floor_e4m3: float = FLOORS["e4m3"]
    floor_e2m1: float = FLOORS["e2m1"]

    def __post_init__(self) -> None:
        for key in ("floor_e4m3", "floor_e2m1"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "at least 0")

    def format(self, name: str) -> Format | None:
        """The format of a name with this section's floors; None for ""."""
        return named(name, self.floor_e4m3 if name.startswith("e4m3") else self.floor_e2m1) if name else None


def _format(key: str, name: str) -> Format:
    try:
        return named(name)
    except ValueError as error:
        raise ValueError(f"{key} = {error}") from None
