"""The four ways a folder in the released layout stores a model: which type each tensor has. No torch.

| format   | routed experts              | other quantised weights | the rest          |
|----------|-----------------------------|-------------------------|-------------------|
| released | FP4 in I8, scales F8_E8M0   | F8_E4M3, scales F8_E8M0 | BF16, F32, I64    |
| fp8      | F8_E4M3, scales F32         | F8_E4M3, scales F32     | BF16, F32, I64    |
| bf16     | BF16                        | BF16                    | BF16, F32, I64    |
| fp32     | F32                         | F32                     | F32, I64          |

fp8 is what -Base checkpoints have; its scales are powers of two, and may be F8_E8M0 instead.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from model.config import ModelConfig
from model.inventory import FileTensor, Stored, TensorSpec, file_tensors, released_tensors

Variant = Literal["released", "fp8", "bf16", "fp32"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
ScaleType = Literal["F8_E8M0", "F32"]
SCALE_TYPES: dict[Variant, tuple[ScaleType, ...]] = {"released": ("F8_E8M0",), "fp8": ("F32", "F8_E8M0")}
"""What scales may be stored as, the usual first."""
QUANTISED = ("F8_E4M3", "FP4")
SLAB_SIZE = 1 << 21
"""Numbers converted at a time, or 128 rows where those are more (ours): 8 MiB in fp32."""
TILE_ROWS = 128
"""Slabs begin at rows that begin a block of any format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slab:
    """Rows of a tensor that are converted together."""

    start: int
    stop: int


def stored(spec: TensorSpec, variant: Variant) -> Stored:
    """How a format stores a tensor."""
    if spec.stored == "I64":
        return "I64"
    if variant == "fp32":
        return "F32"
    if spec.stored in QUANTISED and variant == "bf16":
        return "BF16"
    return "F8_E4M3" if spec.stored == "FP4" and variant == "fp8" else spec.stored


def entries(spec: TensorSpec, variant: Variant, scales: ScaleType | None = None) -> tuple[FileTensor, ...]:
    """What a file of the format has for a tensor: itself, or its codes and its scales, of that type if given."""
    codes, *rest = file_tensors(replace(spec, stored=stored(spec, variant)))
    if not rest:
        return (codes,)
    dtype = scales or SCALE_TYPES[variant][0]
    return codes, replace(rest[0], dtype=dtype, element_bytes=4 if dtype == "F32" else 1)


def variant_of(config: ModelConfig, dtypes: dict[str, str]) -> Variant | None:
    """The format of a folder from the types of its tensors: what its first routed expert says; None where nothing."""
    name = next(spec.name for spec in released_tensors(config, experts=1) if spec.stored == "FP4")
    found: dict[str, Variant] = {"I8": "released", "F8_E4M3": "fp8", "BF16": "bf16", "F32": "fp32"}
    return found.get(dtypes.get(name, ""))


def slabs(spec: TensorSpec) -> list[Slab]:
    """The rows of a tensor in parts of about SLAB_SIZE numbers."""
    rows = spec.shape[0]
    per_slab = max(TILE_ROWS, SLAB_SIZE * rows // max(spec.size, 1) // TILE_ROWS * TILE_ROWS)
    return [Slab(start=start, stop=min(start + per_slab, rows)) for start in range(0, rows, per_slab)]
