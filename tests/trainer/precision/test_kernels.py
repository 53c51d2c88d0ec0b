"""Proves that the kernels' codes and scales are those of the plain casts, bit by bit; SwiGLU's to its exponential.

Interpreted in fp32 and bf16: rounding is by integers, so the interpreter's own casts decide nothing. On a GPU compiled.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.kernels import swiglu
from tests.conftest import ROOT
from tests.model.kernels.test_compiled import SHARED_BYTES, SPILL_BYTES
from tests.model.kernels.twins import ON_CPU
from tests.trainer.precision.golden import stored
from tests.trainer.precision.mistaken import mistaken
from trainer.precision import casts, kernels
from trainer.precision.elements import E4M3_1X128
from trainer.precision.formats import Coded, decode

DEVICES = [
    pytest.param("cpu", marks=ON_CPU, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="compiled"),
]
HERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
INPUTS = tuple(name.removesuffix(".x") for name in sorted(stored()) if name.endswith(".x"))
SHAPES = [(1, 1), (5, 128), (16, 129), (17, 300), (128, 64), (129, 65), (300, 200)]
LIMIT = 1.25


def normal(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def apart(found: Coded, expected: Coded) -> int:
    """How many codes and scales differ."""
    assert (found.codes.shape, found.exponents.shape) == (expected.codes.shape, expected.exponents.shape)
    assert found.codes.dtype == found.exponents.dtype == torch.uint8
    return int((found.codes != expected.codes).sum() + (found.exponents != expected.exponents).sum())


def all_apart(module: ModuleType, x: Tensor, floor: float) -> int:
    """Of the three casts of numbers."""
    rows = casts.cast_rows(x, floor)
    return (
        apart(module.cast_rows(x, floor), rows)
        + apart(module.cast_columns(x, floor), casts.cast_columns(x, floor))
        + apart(module.recast_columns(rows, floor), casts.recast_columns(rows, floor))
    )


@pytest.mark.parametrize("floor", [casts.FLOOR, 0.0, 1.0])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", INPUTS)
def test_golden_inputs(name: str, device: str, floor: float) -> None:
    """Ties, boundaries between scales, subnormal numbers, -0, infinities and NaN."""
    assert all_apart(kernels, stored()[f"{name}.x"].to(device), floor) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], device: str, dtype: torch.dtype) -> None:
    assert all_apart(kernels, normal(device, dtype, *shape), casts.FLOOR) == 0


def strange_codes(device: str) -> list[Coded]:
    """All codes with all scales, which no amax decided; ragged; zeros of large scales beside small numbers."""
    code = torch.arange(256, dtype=torch.uint8, device=device).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1).expand(-1, 2).contiguous()
    shuffled = code[:, torch.randperm(256, generator=torch.Generator().manual_seed(0)).to(device)]
    return [
        Coded(codes=code, exponents=scale),
        Coded(codes=code.T.contiguous(), exponents=scale),
        Coded(codes=shuffled[:100, :150].contiguous(), exponents=scale[100:200]),
        Coded(codes=torch.where(scale[:, :1] > 20, code & 128, code)[:255], exponents=scale[:255]),
    ]


def all_recast_apart(module: ModuleType) -> int:
    return sum(apart(module.recast_columns(one, 0.0), casts.recast_columns(one, 0.0)) for one in strange_codes(HERE))


@pytest.mark.parametrize("device", DEVICES)
def test_all_codes_with_all_scales_turned(device: str) -> None:
    """Sizes beyond fp32 are infinite there as in decoding."""
    for coded, floor in itertools.product(strange_codes(device), (0.0, casts.FLOOR)):
        assert apart(kernels.recast_columns(coded, floor), casts.recast_columns(coded, floor)) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_no_channels(device: str) -> None:
    for shape in ((0, 40), (40, 0)):
        assert all_apart(kernels, torch.empty(shape, device=device), casts.FLOOR) == 0
        found = kernels.swiglu_cast(*[torch.empty(shape, device=device)] * 2, None, LIMIT)
        assert found.codes.shape == shape


def swiglu_operands(
    device: str, dtype: torch.dtype, P: int, F: int, weighted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    gate, up = normal(device, dtype, P, F, seed=1), normal(device, dtype, P, F, seed=2)
    return gate, up, normal(device, torch.float32, P, seed=3).abs() if weighted else None


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 3), (17, 300), (40, 128)], ids=str)
def test_swiglu_is_the_kernel_and_then_the_cast(
    shape: tuple[int, int], device: str, dtype: torch.dtype, weighted: bool
) -> None:
    """Bit by bit: the rounding to the run's type that stands between the two is kept.

    In bf16 the interpreter truncates in the SwiGLU's kernel, so there that runs in fp32 and is rounded here.
    """
    gate, up, weight = swiglu_operands(device, dtype, *shape, weighted=weighted)
    inner = swiglu.clamped_swiglu(gate.float(), up.float(), weight, LIMIT).to(dtype)
    assert apart(kernels.swiglu_cast(gate, up, weight, LIMIT), casts.cast_rows(inner)) == 0


def swiglu_apart(module: ModuleType, device: str, dtype: torch.dtype) -> float:
    """From the plain functions, the part of codes that differ; more than one step off, all."""
    operands = swiglu_operands(device, dtype, 64, 500, weighted=True)
    found, expected = module.swiglu_cast(*operands, LIMIT), casts.swiglu_cast(*operands, LIMIT)
    if not torch.equal(found.exponents, expected.exponents):
        return 1.0
    steps = (found.codes.int() - expected.codes.int()).abs()
    return 1.0 if steps.max() > 1 else float((steps > 0).float().mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_swiglu_is_the_plain_function_and_then_the_cast(device: str, dtype: torch.dtype) -> None:
    """Exponentials differ by some 1e-7 of themselves, codes are 6 % apart: a code in 10,000 may be the next one.

    In bf16 a number may fall to bf16's other neighbour first, which is 1/16 of a code's step.
    """
    assert swiglu_apart(kernels, device, dtype) < (1e-4 if dtype == torch.float32 else 1e-3)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("device", DEVICES)
def test_swiglu_that_is_not_finite_is_seen(device: str) -> None:
    """A clamp would make a number of an infinity; a NaN, in gate, up or weight, must not end as one."""
    for place, bad in ((0, math.nan), (1, math.nan), (2, math.nan), (2, math.inf)):
        operands = swiglu_operands(device, torch.bfloat16, 20, 200, weighted=True)
        operand = operands[place]
        assert operand is not None
        operand[3] = bad
        for module in (kernels, casts):
            found = decode(module.swiglu_cast(*operands, LIMIT), E4M3_1X128)
            assert found[3].isnan().all()
            assert found[:3].isfinite().all()
            assert found[4:].isfinite().all()


def test_fp64_is_refused() -> None:
    for cast in (kernels.cast_rows, kernels.cast_columns):
        with pytest.raises(TypeError, match="expected fp32 or bf16, found fp64"):
            cast(torch.ones(2, 4, dtype=torch.float64))


Change = tuple[str, str]
MISTAKES: dict[str, Change] = {
    "ties away from zero": (" - 1 + ((mantissa >> cut) & 1)) >> cut", ") >> cut"),
    "truncated": ("(mantissa + (1 << (cut - 1)) - 1 + ((mantissa >> cut) & 1))", "mantissa"),
    "no subnormal codes": ("20 + tl.maximum(-6 - power, 0)", "20 + 0 * power"),
    "scale rounded down": ("+ (ONES - 0x600000)) >> 23", ") >> 23"),
    "no floor": ("tl.maximum(amax, floor)", "amax"),
    "subnormal numbers as if they were normal": ("tl.where(size <= ONES, small, size)", "size"),
    "zero as any code": ("tl.where(mantissa == 0, ZERO, key)", "key"),
    "an infinity is a large number": (
        "tl.where(amax == INFINITE, 255, tl.maximum(exponent, 0))",
        "tl.maximum(exponent, 0)",
    ),
    "only the number itself is NaN": ("tl.where(exponent == 255, 255, code | negative)", "code | negative"),
    "no sign": ("_code(key, (bits >> 24) & 128,", "_code(key, (bits >> 24) & 0,"),
    "codes not turned": ("column[:, None] * rows + row[None, :]", "column[:, None] + row[None, :] * C"),
    "subnormal codes without their place": ("tl.maximum(field, 1) - 10", "field - 10"),
    "the code of NaN is 480": ("((code & 127) != 127) & ", ""),
    "always the first block's scale": ("(column // BLOCK)[None, :]", "(column * 0)[None, :]"),
}
SWIGLU_MISTAKES: dict[str, Change] = {
    "gate not clamped": ("tl.where(raw > limit, limit, raw)", "raw"),
    "up not clamped below": ("tl.where(raw < -limit, -limit, raw)", "raw"),
    "no weight": ("if WEIGHT:", "if False:"),
    "bf16 truncated": ("(bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000", "bits & -0x10000"),
    "not rounded to bf16": ("tl.where((bits & 0x7FFFFFFF) > INFINITE, bits, rounded)", "bits"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    """By codes of the golden inputs, or of codes with all scales; what goes wrong with an error is seen, too."""
    wrong = mistaken(tmp_path, kernels, (MISTAKES[name],))
    inputs = [stored()[f"{one}.x"].to(HERE) for one in ("specials", "ties_e4m3", "edges_e4m3", "tiny")]
    checks: list[Callable[[], int]] = [
        lambda: all_recast_apart(wrong),
        *(lambda x=x, floor=floor: all_apart(wrong, x, floor) for x in inputs for floor in (casts.FLOOR, 0.0)),
    ]
    assert any(check() for check in checks)


@pytest.mark.parametrize("name", SWIGLU_MISTAKES)
def test_a_mistake_in_swiglu_is_seen(name: str, tmp_path: Path) -> None:
    wrong = mistaken(tmp_path, kernels, (SWIGLU_MISTAKES[name],))
    assert swiglu_apart(wrong, HERE, torch.bfloat16) > 3e-3


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """At V4-Flash's sizes; no registers spill."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.model.kernels.hopper", "tests.trainer.precision.kernel_calls"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = {line["kernel"].split()[0].rpartition(".")[2] for line in found}
    assert names == {"_cast_rows", "_cast_columns", "_recast_columns", "_swiglu_cast"}
    assert [line for line in found if line["shared"] > SHARED_BYTES or line["stack"] > SPILL_BYTES] == []
