"""Transformer Engine's door: the back end `te`, its block-scaled products and nothing else of it.

Codes and scales are ours, as for every back end, handed over in its own class of block-scaled tensors; so its
quantisers, which cut off an infinity where ours say NaN, are not called, and none of its modules is. A single product
is `general_gemm`, those of experts are `general_grouped_gemm`, which spreads them over several streams. What is used
has no promise of staying as it is: so the version is pinned and each name is looked up before the first step.

Its Float8BlockScaling is Hopper's; Blackwell has MXFP8, other numbers, so that each serves the recipes of its own.
"""

import importlib
import importlib.metadata
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainer.precision import layouts
from trainer.precision.blockscaled import hopper_refusal
from trainer.precision.operands import Operand
from trainer.precision.recipe import Formats

PACKAGE, VERSION = "transformer_engine", "2.20.2"
"""The only release that the names below were held against."""
BLACKWELL = 10
"""Major compute capability of the GPUs on which it has MXFP8 products."""
USED = {
    "transformer_engine.pytorch": (
        "DType",
        "Float8BlockQuantizer",
        "Float8BlockwiseQTensorStorage",
        "MXFP8Quantizer",
        "MXFP8TensorStorage",
    ),
    "transformer_engine.pytorch.cpp_extensions": ("general_gemm", "general_grouped_gemm"),
}
"""What is used, by module."""


def refusal(formats: Formats, device: torch.device) -> str:
    """Why these formats cannot be computed on the device; "": they can. Imports Transformer Engine only if they may."""
    if layouts.of(formats) is layouts.BLACKWELL:
        return _blackwell_refusal(device) or _unknown()
    return layouts.HOPPER.refusal(formats) or hopper_refusal(device) or _unknown()


def describe() -> str:
    """What multiplies."""
    return f"te {VERSION}: general_gemm and general_grouped_gemm, blocks of 1x128 and 128x128, or of 32"


def multiply(pairs: Sequence[tuple[Operand, Operand]], dtype: torch.dtype) -> list[Tensor]:
    """a b^T of each pair. Transformer Engine names the weight, b, first."""
    if not pairs:
        return []
    used = _used()
    rights = [_tensor(b, used) for _, b in pairs]
    lefts = [_tensor(a, used) for a, _ in pairs]
    if len(pairs) == 1:
        return [used["general_gemm"](rights[0], lefts[0], out_dtype=dtype, layout="TN")[0]]
    results = [a.codes.new_empty(len(a.codes), len(b.codes), dtype=dtype) for a, b in pairs]
    unquantised, rows = [None] * len(pairs), [len(a.codes) for a, _ in pairs]
    used["general_grouped_gemm"](
        rights, lefts, results, unquantised, dtype, layout="TN", m_splits=rows, use_split_accumulator=True
    )
    return results


def _tensor(operand: Operand, used: dict[str, Any]) -> Any:
    """An operand as a tensor of Transformer Engine; its scales lie as ours do, MXFP8's until it swizzles them."""
    element = used["DType"].kFloat8E4M3
    if operand.scales.dtype == torch.uint8:
        return used["MXFP8TensorStorage"](
            rowwise_data=operand.codes,
            rowwise_scale_inv=operand.scales,
            columnwise_data=None,
            columnwise_scale_inv=None,
            fp8_dtype=element,
            quantizer=_mx_quantizer(),
            with_gemm_swizzled_scales=False,
        )
    return used["Float8BlockwiseQTensorStorage"](
        rowwise_data=operand.codes.contiguous(),
        rowwise_scale_inv=operand.scales,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=element,
        quantizer=_quantizer(operand.tall),
        is_2D_scaled=operand.tall,
    )


@cache
def _quantizer(tall: bool) -> Any:
    """The quantiser that a tensor of Transformer Engine must name; it quantises nothing here."""
    used = _used()
    return used["Float8BlockQuantizer"](
        used["DType"].kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=2 if tall else 1
    )


@cache
def _mx_quantizer() -> Any:
    used = _used()
    return used["MXFP8Quantizer"](used["DType"].kFloat8E4M3, rowwise=True, columnwise=False)


@cache
def _used() -> dict[str, Any]:
    """What is used of Transformer Engine, by name. It needs torch's libraries loaded, so it is imported late."""
    return {name: getattr(importlib.import_module(module), name) for module, names in USED.items() for name in names}


def _blackwell_refusal(device: torch.device) -> str:
    """Why there are no products with E8M0 scales of blocks of 32 on the device; "": there are."""
    if device.type != "cuda":
        return f"a {device.type} has no MXFP8 products; an NVIDIA GPU of compute capability 10 has"
    major, minor = torch.cuda.get_device_capability(device)
    if major == BLACKWELL:
        return ""
    return f"compute capability {major}.{minor} has no MXFP8 products in Transformer Engine {VERSION}; 10 has"


def _unknown() -> str:
    """Why this Transformer Engine cannot serve: absent, another release, or without a name that is used."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "the package transformer-engine is not installed"
    if found != VERSION:
        return f"transformer-engine is {found}, and its calls are known of {VERSION} only"
    for module, names in USED.items():
        try:
            owner = importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            return f"transformer-engine {VERSION} cannot be imported: {str(error).splitlines()[0]}"
        for name in names:
            if not hasattr(owner, name):
                return f"transformer-engine {VERSION} lacks {module}.{name}"
    return ""
