"""Who serves at the model's seams: the one ordered list of what may be set on a built model.

A module is built with plain functions in its seams. Whatever replaces one is assigned here, before the first step;
no forward pass asks which it is.
"""

import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

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

Kernels = Literal["off", "triton"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """The attribute of a kind of module, and its kernel: module.function below `model.kernels`."""

    owner: type[nn.Module]
    attribute: str
    kernel: str


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
)


def choose_kernels(config: TrainConfig, device: torch.device) -> Kernels:
    """What `config.kernels` means on this device: auto is triton on a GPU if it is installed and the type allows.

    Raises ValueError where triton was asked for, or chosen, and cannot serve.
    """
    fp64, chosen = config.precision.dtype == "fp64", config.kernels
    if chosen == "auto":
        chosen = "triton" if device.type == "cuda" and _installed() and not fp64 else "off"
    if chosen == "triton":
        N, C = config.model.hc_mult, config.model.head_dim
        require(_installed(), "kernels", "triton", "the package triton, which is not installed, or kernels=off")
        require(not fp64, "kernels", "triton", "precision.dtype of fp32 or bf16, which kernels compute in")
        require(N & (N - 1) == 0, "model.hc_mult", N, "a power of two, or kernels=off")
        require(C % 2 == 0, "model.head_dim", C, "an even number, or kernels=off")
        if device.type != "cuda":
            require(_interpreted(), "kernels", "triton", "a GPU; on a CPU kernels=off, or TRITON_INTERPRET=1 for tests")
            require(config.threads == 1, "kernels", "triton", "threads=1 in Triton's interpreter")
    return chosen


def apply_kernels(model: Transformer, which: Kernels) -> None:
    """Set the kernels of SEAMS on every module of the model; "off" leaves it as it was built."""
    for seam in SEAMS if which == "triton" else ():
        name, function = seam.kernel.split(".")
        kernel = getattr(importlib.import_module(f"model.kernels.{name}"), function)
        for module in model.modules():
            if isinstance(module, seam.owner):
                setattr(module, seam.attribute, kernel)


def describe_kernels(which: Kernels) -> str:
    """What serves, in one line that is the same if and only if the same code computes: for people and provenance."""
    if which == "off":
        return "off"
    names = dict.fromkeys(seam.kernel.split(".")[1] for seam in SEAMS)
    how = " interpreted" if _interpreted() else ""
    return f"triton {importlib.metadata.version('triton')}{how}: {', '.join(names)}"


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
