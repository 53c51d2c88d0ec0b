"""Who serves at the model's seams: the one ordered list of what may be set on a built model.

A module is built with plain functions in its seams. Whatever replaces one is assigned here, before the first step;
no forward pass asks which it is.
"""

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from model.attention import Attention
from model.block import Block
from model.compressor import Compressor
from model.config import require
from model.experts import Experts, SharedExpert
from model.layers import RMSNorm
from model.transformer import Transformer
from trainer.config import TrainConfig
from trainer.device import DTYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """The attribute of a kind of module, and its kernel: module.function below `model.kernels`.

    library: what the kernel is written in or calls. only: the one type of the model that it serves, None for any.
    """

    owner: type[nn.Module]
    attribute: str
    kernel: str
    library: str = "triton"
    only: torch.dtype | None = None


SEAMS = (
    Seam(owner=Block, attribute="enter", kernel="enter.enter"),
    Seam(owner=Block, attribute="expand", kernel="expand.expand"),
    Seam(owner=RMSNorm, attribute="norm", kernel="norm.rms_norm"),
    Seam(owner=Attention, attribute="norm_rotate", kernel="norm.norm_rotate"),
    Seam(owner=Compressor, attribute="norm_rotate", kernel="norm.norm_rotate"),
    Seam(owner=Attention, attribute="rotate", kernel="rotate.rotate"),
    Seam(owner=Compressor, attribute="pool", kernel="pool.pool"),
    Seam(owner=Attention, attribute="attend", kernel="attend.attend"),
    Seam(owner=Attention, attribute="select", kernel="indexer.select"),
    Seam(owner=Experts, attribute="swiglu", kernel="swiglu.clamped_swiglu"),
    Seam(owner=SharedExpert, attribute="swiglu", kernel="swiglu.clamped_swiglu"),
    # In other types torch has no kernel and calls one product per expert, as the plain function does.
    Seam(
        owner=Experts,
        attribute="grouped_matmul",
        kernel="grouped.grouped_matmul",
        library="torch",
        only=torch.bfloat16,
    ),
)
ROW_BF16, GROUPS = 8, 1024
"""What torch's grouped product asks: rows of a multiple of 16 bytes, 8 numbers in bf16; fewer experts than this."""


def serving(dtype: torch.dtype) -> tuple[Seam, ...]:
    """The seams that kernels serve in a model of this type, in their order."""
    return tuple(seam for seam in SEAMS if seam.only in (None, dtype))


def choose_kernels(config: TrainConfig, device: torch.device) -> tuple[Seam, ...]:
    """The seams that kernels serve; none is off. auto is triton on a GPU if it is installed and the type allows.

    Raises ValueError where triton was asked for, or chosen, and cannot serve.
    """
    fp64, chosen = config.precision.dtype == "fp64", config.kernels
    if chosen == "auto":
        chosen = "triton" if device.type == "cuda" and _installed() and not fp64 else "off"
    if chosen == "triton":
        require(_installed(), "kernels", "triton", "the package triton, which is not installed, or kernels=off")
        require(not fp64, "kernels", "triton", "precision.dtype of fp32 or bf16, which kernels compute in")
        _require_sizes(config)
        if device.type != "cuda":
            require(_interpreted(), "kernels", "triton", "a GPU; on a CPU kernels=off, or TRITON_INTERPRET=1 for tests")
            require(config.threads == 1, "kernels", "triton", "threads=1 in Triton's interpreter")
    return serving(DTYPES[config.precision.dtype]) if chosen == "triton" else ()


def _require_sizes(config: TrainConfig) -> None:
    N, C, E = config.model.hc_mult, config.model.head_dim, config.model.n_routed_experts
    require(N & (N - 1) == 0, "model.hc_mult", N, "a power of two, or kernels=off")
    require(C % 2 == 0, "model.head_dim", C, "an even number, or kernels=off")
    if config.precision.dtype == "bf16":
        require(E < GROUPS, "model.n_routed_experts", E, f"less than {GROUPS} in bf16, or kernels=off")
        for key in ("hidden_size", "moe_intermediate_size"):
            width = getattr(config.model, key)
            require(width % ROW_BF16 == 0, f"model.{key}", width, f"a multiple of {ROW_BF16} in bf16, or kernels=off")


def apply_kernels(model: Transformer, seams: Sequence[Seam]) -> None:
    """Set the kernels of these seams on every module of the model; none leaves it as it was built."""
    for seam in seams:
        name, function = seam.kernel.split(".")
        kernel = getattr(importlib.import_module(f"model.kernels.{name}"), function)
        for module in model.modules():
            if isinstance(module, seam.owner):
                setattr(module, seam.attribute, kernel)


def describe_kernels(seams: Sequence[Seam]) -> str:
    """What serves, in one line that is the same if and only if the same code computes: for people and provenance.

    torch's version is not in it: it is a fact of every run.
    """
    names: dict[str, dict[str, None]] = {}
    for seam in seams:
        names.setdefault(seam.library, {})[seam.kernel.split(".")[1]] = None
    how = " interpreted" if _interpreted() else ""
    titles = {"triton": f"triton {importlib.metadata.version('triton')}{how}", "torch": "torch"} if seams else {}
    return "; ".join(f"{titles[library]}: {', '.join(found)}" for library, found in names.items()) or "off"


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
