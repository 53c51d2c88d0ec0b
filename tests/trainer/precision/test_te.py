"""Proves that the back end `te` hands Transformer Engine the operands of the emulated products, in its layouts.

A stand-in (`engine.py`) computes here. That the real one does is for a GPU to show (`test_gpu.py`).
"""

import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.trainer.precision import engine
from tests.trainer.precision.hopper import FP8, on_hopper, operands
from tests.trainer.precision.test_blockscaled import RAGGED, assert_equal, three
from trainer.precision import backends, te
from trainer.precision.health import Watch

CUDA = torch.device("cuda")
TE, EMULATED = backends.products_of("te"), backends.products_of("emulated")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The stand-in, installed, on a Hopper GPU."""
    on_hopper(monkeypatch)
    with engine.installed(monkeypatch) as modules:
        yield modules


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("counts", "D", "out"), [(RAGGED, 200, 72), ([256, 128], 640, 384), ([7], 128, 16)])
def test_products_equal_the_emulated_ones(counts: list[int], D: int, out: int, dtype: torch.dtype) -> None:
    given = operands(counts, D, out, dtype)
    found, expected = (
        three(lambda x, w, back=back: back.grouped(FP8, Watch())(x, w, counts), **given) for back in (TE, EMULATED)
    )
    assert_equal(found, expected)


@pytest.mark.usefixtures("library")
def test_linear_maps_and_maps_side_by_side_equal_the_emulated_ones() -> None:
    given = operands([75] * 4, 136, 24, torch.float32)
    x, grad = (given[name].unflatten(0, (4, 3, 25)).permute(1, 2, 0, 3) for name in ("x", "grad"))
    found, expected = (three(back.side_by_side(FP8, Watch()), x, given["weight"], grad) for back in (TE, EMULATED))
    assert_equal(found, expected)
    one = {"x": given["x"], "weight": given["weight"][0], "grad": given["grad"]}
    assert_equal(*(three(back.linear(FP8, Watch()), **one) for back in (TE, EMULATED)))


@pytest.mark.usefixtures("library")
def test_the_known_release_serves_hopper() -> None:
    assert te.refusal(FP8, CUDA) == ""
    assert te.describe() == "te 2.20.2: general_gemm and general_grouped_gemm, blocks of 1x128 and 128x128, or of 32"


def test_another_release_is_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.21.0")
    assert te.refusal(FP8, CUDA) == "transformer-engine is 2.21.0, and its calls are known of 2.20.2 only"


def test_a_name_that_is_gone_is_refused(library: dict[str, ModuleType]) -> None:
    del library["transformer_engine.pytorch.cpp_extensions"].general_grouped_gemm
    line = "transformer-engine 2.20.2 lacks transformer_engine.pytorch.cpp_extensions.general_grouped_gemm"
    assert te.refusal(FP8, CUDA) == line


def test_a_library_that_cannot_be_imported_is_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    line = "transformer-engine 2.20.2 cannot be imported: import of transformer_engine.pytorch halted"
    assert te.refusal(FP8, CUDA).startswith(line)


def test_where_it_is_not_installed_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder of its name lies about, of which no package tells."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    on_hopper(monkeypatch)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    assert te.refusal(FP8, CUDA) == "the package transformer-engine is not installed"


@pytest.mark.usefixtures("library")
def test_an_old_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch, cuda="12.8")
    assert te.refusal(FP8, CUDA) == "this torch is built for CUDA 12.8, before 12.9"


def test_blackwell_is_another_recipe_and_a_cpu_has_none(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch, (10, 0))
    line = "compute capability 10.0 scales blocks of 32: other numbers, so another recipe, mxfp8"
    assert te.refusal(FP8, CUDA) == line
    assert te.refusal(FP8, torch.device("cpu")).startswith("a cpu has no block-scaled FP8 products")
