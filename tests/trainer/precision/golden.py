"""What tests of formats share: stored codes and scales of the oracle and of DeepSeek's casts, how many are not ours."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import ROOT
from trainer.precision import formats
from trainer.precision.elements import Format, named

SUFFIX = ".no_floor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An input with the codes and exponents that its format must give."""

    name: str
    x: Tensor
    format: Format
    codes: Tensor
    exponents: Tensor


@cache
def stored() -> dict[str, Tensor]:
    """The golden set by the names of its file."""
    return load_file(ROOT / "tests" / "golden" / "formats.safetensors")


@cache
def golden() -> tuple[Case, ...]:
    """The golden set of the oracle."""
    return tuple(_cases(stored(), "exponents"))


@cache
def reference(shared: Path) -> tuple[Case, ...]:
    """The reference casts of the fixtures; E2M1 codes are packed there."""
    return tuple(_cases(load_file(shared / "fixtures" / "quant" / "quant.safetensors"), "scale_exponent"))


def wrong(case: Case, module: ModuleType = formats) -> int:
    """How many codes and exponents of this module differ from the case."""
    found = module.encode(case.x, case.format)
    codes = found.codes
    if case.format.element == "e2m1" and codes.shape != case.codes.shape:
        codes = module.pack(codes)
    pairs = (codes, case.codes), (found.exponents, case.exponents)
    return sum(int((ours != right).sum()) if ours.shape == right.shape else right.numel() for ours, right in pairs)


def _cases(tensors: dict[str, Tensor], exponents: str) -> Iterator[Case]:
    inputs = {name.removesuffix(".x"): tensor for name, tensor in tensors.items() if name.endswith(".x")}
    for name, x in inputs.items():
        of = [key.removesuffix(".codes") for key in tensors if key.startswith(f"{name}.") and key.endswith(".codes")]
        for key in of:
            format = key.removeprefix(f"{name}.")
            yield Case(
                name=key,
                x=x,
                format=named(format.removesuffix(SUFFIX), 0.0 if format.endswith(SUFFIX) else None),
                codes=tensors[f"{key}.codes"],
                exponents=tensors[f"{key}.{exponents}"],
            )
