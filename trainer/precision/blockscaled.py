"""The back end `torch`: block-scaled products of torch, which are cuBLASLt's, on Hopper.

`torch.nn.functional.scaled_mm` takes a [M, K] row by row and b [K, N] column by column; scales as [M, K / 128] and, of
128x128 blocks, as [K / 128 filled up to a multiple of 4, N / 128], the first dim dense in both. Its grouped product has
no block scales on Hopper, so that every expert has a call of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.precision import layouts
from trainer.precision.operands import Operand
from trainer.precision.recipe import Formats

HOPPER = (9, 0)
CUDA = (12, 9)
"""The first with block-scaled products in cuBLASLt."""


def refusal(formats: Formats, device: torch.device) -> str:
    """Why these formats cannot be computed on the device; "": they can."""
    return layouts.HOPPER.refusal(formats) or hopper_refusal(device) or _library_refusal()


def describe() -> str:
    """What multiplies. torch's version is a fact of every run."""
    return "torch: scaled_mm, blocks of 1x128 and 128x128"


def multiply(pairs: Sequence[tuple[Operand, Operand]], dtype: torch.dtype) -> list[Tensor]:
    """a b^T of each pair."""
    return [_product(a, b, dtype) for a, b in pairs]


def hopper_refusal(device: torch.device) -> str:
    """Why cuBLASLt has no products with fp32 block scales on the device; "": it has."""
    if device.type != "cuda":
        return f"a {device.type} has no block-scaled FP8 products; an NVIDIA GPU of compute capability 9.0 has"
    capability = torch.cuda.get_device_capability(device)
    if capability == HOPPER:
        found = tuple(map(int, (torch.version.cuda or "0").split(".")))
        return "" if found >= CUDA else f"this torch is built for CUDA {torch.version.cuda}, before 12.9"
    number = ".".join(map(str, capability))
    if capability > HOPPER:
        return f"compute capability {number} scales blocks of 32: other numbers, so another recipe, mxfp8"
    return f"compute capability {number} has no block-scaled FP8 products; 9.0 (Hopper) has"


def _library_refusal() -> str:
    kinds = getattr(F, "ScalingType", None)
    names = ("BlockWise1x128", "BlockWise128x128")
    if not hasattr(F, "scaled_mm") or not all(hasattr(kinds, name) for name in names):
        return f"torch {torch.__version__} has no scaled_mm with blocks of 128; 2.11 has"
    return ""


def _product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    kinds = F.ScalingType
    return F.scaled_mm(
        a.codes.view(torch.float8_e4m3fn),
        b.codes.view(torch.float8_e4m3fn).mT,
        a.scales.mT,
        kinds.BlockWise1x128,
        b.scales.mT,
        kinds.BlockWise128x128 if b.tall else kinds.BlockWise1x128,
        output_dtype=dtype,
    )
