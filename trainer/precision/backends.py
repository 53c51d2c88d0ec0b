"""Which back end multiplies numbers with formats: chosen once, before the first step, and never changed silently."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from model.config import require
from trainer.precision import emulated, products
from trainer.precision.config import Precision, PrecisionConfig
from trainer.precision.emulated import Grouped, Linear
from trainer.precision.health import Watch
from trainer.precision.recipe import Formats, Recipe

EMULATED = "emulated"
MODULES = {"torch": "blockscaled", "te": "te", EMULATED: "emulated"}
"""The back ends that compute, fastest first, and their modules in this package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Products:
    """What a back end puts at the model's precision seams, made for a parameter's formats and a watch of its operands.

    `emulated.py` says what each computes.
    """

    linear: Callable[[Formats, Watch], Linear]
    side_by_side: Callable[[Formats, Watch], Linear]
    grouped: Callable[[Formats, Watch], Grouped]


def choose(config: PrecisionConfig, table: Mapping[str, Formats], device: torch.device) -> str:
    """The one back end of a run whose parameters have these formats: the asked one; auto: the first that can.

    One serves all products with formats, so that a log, and a difference between two, has one cause. Raises ValueError
    where the asked one cannot compute a format, or in the run's type, exactly.
    """
    refusal = partial(_refusal, table=table, device=device, dtype=config.dtype)
    if config.backend == "auto":
        return next(name for name in MODULES if not refusal(name))
    reason = refusal(config.backend)
    # Others are asked only then, for to ask is to import their libraries.
    able = ["auto", *(name for name in MODULES if not refusal(name))] if reason else []
    require(not reason, "precision.backend", config.backend, f"{' or '.join(able)}, because {reason}")
    return config.backend


def module(name: str) -> ModuleType:
    """The module of a back end. Each has `refusal`; all but the emulated one have `describe` and `multiply`, too."""
    return importlib.import_module(f"trainer.precision.{MODULES[name]}")


def products_of(name: str) -> Products:
    """The products of a back end: the emulated one's own, of the others those of `products.py` by their `multiply`."""
    if name == EMULATED:
        return Products(linear=emulated.linear, side_by_side=emulated.side_by_side, grouped=emulated.grouped)
    multiply = module(name).multiply
    return Products(
        linear=partial(products.linear, multiply),
        side_by_side=partial(products.side_by_side, multiply),
        grouped=partial(products.grouped, multiply),
    )


def of_run(config: PrecisionConfig, recipe: Recipe, device: torch.device) -> str:
    """`choose` for all that the parameters have at any time of a run; on the meta device, where nothing is computed,
    the asked one."""
    if device.type == "meta":
        return EMULATED if config.backend == "auto" else config.backend
    stages = {start: recipe.at(start) for start in recipe.stages}
    table = {
        name if start == 0 else f"{name} from {start} tokens on": formats
        for start, found in stages.items()
        for name, formats in found.items()
    }
    return choose(config, table, device)


def describe(name: str) -> str:
    """What multiplies, in one line that is the same if and only if the same code computes, as for kernels."""
    return EMULATED if name == EMULATED else module(name).describe()


def _refusal(name: str, table: Mapping[str, Formats], device: torch.device, dtype: Precision) -> str:
    """The first reason why a back end cannot compute a format of the table in this type, with the parameter's name."""
    for formats, parameter in _with_formats(table).items():
        if name != EMULATED and dtype == "fp64":
            return f"its products are in fp32 or bf16, not in fp64 ({parameter})"
        reason = module(name).refusal(formats, device)
        if reason:
            return f"{reason} ({parameter})"
    return ""


def _with_formats(table: Mapping[str, Formats]) -> dict[Formats, str]:
    """The formats of the products that a back end computes, each with the first parameter that has it."""
    found: dict[Formats, str] = {}
    for parameter, formats in table.items():
        if not formats.has_plain_products:
            found.setdefault(formats, parameter)
    return found
