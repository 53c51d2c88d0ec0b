"""What the tests of kernels share: a plain function and its twin on the same inputs, and how far they are apart."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import model.kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A device, the type of the tensors that are not of an fp32 island, and how far twins may be apart there.

    Relative to the largest number of each result. fp32: sums of up to some hundred terms in another order, and
    hardware's exp, division and root, each a few units of 6e-8. bf16: results are rounded to 2^-9, plain gradients
    twice, and one of them may be rounded to the other side.
    """

    device: str
    dtype: torch.dtype
    limit: float


INTERPRETED = Place(device="cpu", dtype=torch.float32, limit=5e-6)
GPU_FP32 = Place(device="cuda", dtype=torch.float32, limit=1e-5)
GPU_BF16 = Place(device="cuda", dtype=torch.bfloat16, limit=2**-7)

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled for it")
PLACES = [
    pytest.param(INTERPRETED, marks=ON_CPU, id="interpreted fp32"),
    pytest.param(GPU_FP32, marks=pytest.mark.gpu, id="compiled fp32"),
    pytest.param(GPU_BF16, marks=pytest.mark.gpu, id="compiled bf16"),
]
HERE = GPU_FP32 if torch.cuda.is_available() else INTERPRETED
"""Where a single place is enough."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = Mapping[str, Tensor]


def apart(plain: Function, twin: Function, inputs: Inputs, weigh: Callable[[Tensor], Tensor] | None = None) -> float:
    """The largest difference in results and in the gradients of all inputs, relative to the largest number of each.

    Gradients are of the results' product with fixed random numbers; `weigh` may set some of those to zero, and the
    results there are not compared.
    """
    expected, found = (_observe(function, inputs, weigh) for function in (plain, twin))
    assert expected.keys() == found.keys()
    return max(_relative(expected[name], found[name], name) for name in expected)


def _observe(function: Function, inputs: Inputs, weigh: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    results = function(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    draw = torch.Generator().manual_seed(7)
    total, seen = torch.zeros((), device=results[0].device), {}
    for i, result in enumerate(results):
        weight = torch.randn(result.shape, generator=draw).to(result.device)
        weight = weight if weigh is None else weigh(weight)
        total = total + (result.float() * weight).sum()
        seen[f"result {i}"] = torch.where(weight == 0, 0, result.detach())
    total.backward()
    return seen | {f"gradient of {name}": _gradient(leaf, name) for name, leaf in leaves.items()}


def _gradient(leaf: Tensor, name: str) -> Tensor:
    assert leaf.grad is not None, f"{name} has no gradient"
    return leaf.grad


def _relative(expected: Tensor, found: Tensor, name: str) -> float:
    assert (expected.shape, expected.dtype) == (found.shape, found.dtype), name
    assert expected.isfinite().all(), name
    difference, size = (found - expected).abs().max().item(), expected.abs().max().item()
    return difference / size if found.isfinite().all() and size else float("inf")


def random(place: Place, *shape: int, seed: int = 0, island: bool = False, scale: float = 1.0) -> Tensor:
    """Normal numbers on the place, in its type, or in fp32 for a tensor of an island."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return numbers.to(place.device, torch.float32 if island else place.dtype)


def mistaken(folder: Path, file: str, *changes: tuple[str, str]) -> ModuleType:
    """A copy of model/kernels/<file>.py with pieces of its text replaced; each piece must occur exactly once."""
    text = (Path(model.kernels.__path__[0]) / f"{file}.py").read_text(encoding="utf-8")
    for piece, instead in changes:
        assert text.count(piece) == 1, f"{piece!r} occurs {text.count(piece)} times, expected 1"
        text = text.replace(piece, instead)
    path = folder / f"mistaken_{file}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
