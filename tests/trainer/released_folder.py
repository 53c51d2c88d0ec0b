"""A made-up model folder in the released layout: random codes and scales, written by safetensors, by nothing of ours.

Names and shapes are the oracle's, stored types those of the released checkpoints' listings.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.cases import model_shapes, random_config

FP8 = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")
"""Matrices that are FP8, but for those of compressors; experts' are FP4."""
INDEX = "model.safetensors.index.json"


def config(**changes: Any) -> dict[str, Any]:
    """Every kind of layer; more than a block in each direction, the last ones cut."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 144, "q_lora_rank": 130, "n_routed_experts": 3}
    sizes |= {"num_experts_per_tok": 2, "num_hidden_layers": 3, "compress_ratios": [0, 4, 8, 0], "num_hash_layers": 1}
    sizes |= {"torch_dtype": "bfloat16", "expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8"}}
    return random_config(4) | sizes | changes


def tensors(
    keys: Mapping[str, Any], seed: int = 0, *, variant: str = "released", exponents: tuple[int, int] = (90, 150)
) -> dict[str, Tensor]:
    """All stored tensors. variant: released, fp8 (experts too, scales in F32), bf16 or fp32."""
    draw = np.random.default_rng(seed)
    found: dict[str, Tensor] = {}
    for name, (shape, _) in model_shapes(keys).items():
        for stored, tensor in _tensor(name, shape, keys, draw, variant, exponents).items():
            found[stored] = tensor
    return found


def kind_of(name: str) -> str:
    """F8_E4M3, FP4, BF16, F32 or I64: as a released checkpoint stores it."""
    parts = name.split(".")
    if name.endswith("tid2eid"):
        return "I64"
    if "hc_" in name or parts[-1] in ("ape", "attn_sink", "bias"):
        return "F32"
    if ".experts." in name:
        return "FP4"
    quantised = len(parts) > 1 and parts[-2] in FP8 and "compressor" not in name
    return "F8_E4M3" if quantised else "BF16"


def _tensor(
    name: str,
    shape: tuple[int, ...],
    keys: Mapping[str, Any],
    draw: np.random.Generator,
    variant: str,
    exponents: tuple[int, int],
) -> dict[str, Tensor]:
    kind = kind_of(name)
    if kind == "I64":
        return {name: torch.from_numpy(draw.integers(0, keys["n_routed_experts"], shape))}
    if kind not in ("FP4", "F8_E4M3") or variant in ("bf16", "fp32"):
        values = torch.from_numpy(draw.normal(size=shape).astype(np.float32)) * 0.1
        return {name: values.bfloat16() if kind != "F32" and variant != "fp32" else values}
    scale = name.removesuffix("weight") + "scale"
    if kind == "FP4" and variant == "released":
        codes = torch.from_numpy(draw.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)).view(torch.int8)
        return {name: codes, scale: _scales((shape[0], -(-shape[1] // 32)), draw, exponents)}
    raw = draw.integers(0, 254, shape, dtype=np.uint8)
    raw += (raw >= 127).astype(np.uint8)  # no 127, and no 255: the NaNs
    scales = _scales((-(-shape[0] // 128), -(-shape[1] // 128)), draw, exponents)
    codes = torch.from_numpy(raw).view(torch.float8_e4m3fn)
    return {name: codes, scale: scales.float() if variant == "fp8" else scales}


def _scales(shape: tuple[int, int], draw: np.random.Generator, exponents: tuple[int, int]) -> Tensor:
    return torch.from_numpy(draw.integers(*exponents, shape, dtype=np.uint8)).view(torch.float8_e8m0fnu)


def write(folder: Path, keys: Mapping[str, Any], stored: Mapping[str, Tensor], *, files: int = 2) -> Path:
    """The folder, its tensors over so many files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(keys, indent=3))
    where = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(stored.items())[number::files])
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """By name: type, shape and SHA-256 of what a folder stores, read by safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                tensor = file.get_tensor(name)
                content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(content).hexdigest()
    return found


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def numbers(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stored tensors stand for, fp64 (int64 of tid2eid), by the words of the released format alone."""
    found = {}
    for name, tensor in stored.items():
        scale = stored.get(name.removesuffix("weight") + "scale")
        if name.endswith(".scale"):
            continue
        if tensor.dtype == torch.int64 or scale is None:
            found[name] = tensor if tensor.dtype == torch.int64 else tensor.double()
            continue
        if scale.dtype == torch.float8_e8m0fnu:
            scale = torch.from_numpy(np.exp2(scale.view(torch.uint8).numpy().astype(np.float64) - 127))
        values, block = tensor.double() if tensor.dtype != torch.int8 else _fp4(tensor), (128, 128)
        if tensor.dtype == torch.int8:
            block = (1, 32)
        rows, columns = values.shape
        row_R, column_C = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
        found[name] = values * scale.double()[row_R][:, column_C]
    return found


def _fp4(packed: Tensor) -> Tensor:
    """[out, in]: the low nibble is the even column."""
    found = np.empty((packed.shape[0], 2 * packed.shape[1]))
    bytes_RC = packed.view(torch.uint8).numpy()
    found[:, 0::2], found[:, 1::2] = np.take(E2M1, bytes_RC % 16), np.take(E2M1, bytes_RC // 16)
    return torch.from_numpy(found)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal, and zeros of one sign."""
    return torch.equal(left, right) and torch.equal(left.signbit(), right.signbit())
