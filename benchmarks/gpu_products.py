"""Products in bf16 and with FP8 operands at V4-Flash's sizes, for `benchmarks.gpu_precision`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import gpu
from model.config import ModelConfig
from model.kernels import grouped as grouped_bf16
from trainer.precision import backends
from trainer.precision.elements import E4M3_1X128, E4M3_128X1, E4M3_128X128
from trainer.precision.formats import rounded
from trainer.precision.health import Watch
from trainer.precision.layouts import casts
from trainer.precision.operands import Groups, WeightCodes, rows_of
from trainer.precision.recipe import Formats

FP8 = Formats(weight=(E4M3_128X128,), input=E4M3_1X128, grad=E4M3_1X128, wgrad_input=E4M3_128X1, wgrad_grad=E4M3_128X1)
COLUMNS = ("map", "who", "product TFLOP/s", "to bf16", "map ms", "to bf16", "apart")
EXPERTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A linear map of P rows from D to F channels; counts: of the rows of each of several such maps."""

    name: str
    D: int
    F: int
    counts: tuple[int, ...]

    @property
    def flop(self) -> int:
        """Of one of the three products."""
        return 2 * sum(self.counts) * self.D * self.F


def shapes(config: ModelConfig, T: int) -> list[Shape]:
    """Of the linear maps and experts of a model, for rows of T tokens."""
    D, Q, H = config.hidden_size, config.q_lora_rank, config.num_attention_heads * config.head_dim
    G, R, F = config.o_groups, config.o_lora_rank, config.moe_intermediate_size
    sizes = {"wq_a": (D, Q), "wq_b": (Q, H), "wkv": (D, config.head_dim), "wo_b": (G * R, D), "shared w1": (D, F)}
    dense = [Shape(name=f"{name} {d} to {f}", D=d, F=f, counts=(T,)) for name, (d, f) in sizes.items()]
    each = T * config.num_experts_per_tok // EXPERTS
    # Uneven, as routing is, with the same sum.
    counts = tuple(each + (each // 4 if expert % 2 else -(each // 4)) for expert in range(EXPERTS))
    return [
        *dense,
        Shape(name=f"square {2 * D}", D=2 * D, F=2 * D, counts=(T,)),
        Shape(name=f"wo_a, {G} side by side", D=H // G, F=R, counts=(T,) * G),
        Shape(name=f"w1 of {EXPERTS} experts", D=D, F=F, counts=counts),
        Shape(name=f"w2 of {EXPERTS} experts", D=F, F=D, counts=counts),
    ]


def rows(shape: Shape, able: Sequence[str], where: gpu.Place) -> Iterator[tuple[str, ...]]:
    """A row of the table for bf16 and each back end that can; the product alone, and the map forwards and backwards.

    The map makes its codes, those of the weight apart, which are made once per optimizer step.
    """
    dtype = torch.float32 if where.device.type == "cpu" else torch.bfloat16
    draw = torch.Generator(where.device).manual_seed(0)
    normal = {"generator": draw, "device": where.device}
    x = torch.randn(sum(shape.counts), shape.D, **normal).to(dtype).requires_grad_()
    weight = rounded(torch.randn(len(shape.counts), shape.F, shape.D, **normal) * 0.02, E4M3_128X128).to(dtype)
    grad = torch.randn(sum(shape.counts), shape.F, **normal).to(dtype)
    weight.requires_grad_()
    plain = _bf16(shape)
    base_product = _forward(plain, x, weight, where)
    base_map = where.seconds(_map(plain, x, weight, grad))
    yield _cells(shape, "bf16" if dtype == torch.bfloat16 else "fp32", base_product, base_map, base_product, base_map)
    expected = backends.products_of(backends.EMULATED).grouped(FP8, Watch())(x, weight, list(shape.counts)).detach()
    for name in able:
        serve = backends.products_of(name).grouped(FP8, Watch())

        def product(x: Tensor, weight: Tensor, serve: Callable[..., Tensor] = serve) -> Tensor:
            return serve(x, weight, list(shape.counts))

        found = product(x, weight).detach()
        apart = float((found.float() - expected.float()).norm() / expected.float().norm())
        alone = _operands_ready(name, shape, x, weight, where)
        whole = where.seconds(_map(product, x, weight, grad))
        yield (*_cells(shape, name, alone, whole, base_product, base_map)[:-1], f"{apart:.1e}")


def _bf16(shape: Shape) -> Callable[[Tensor, Tensor], Tensor]:
    if len(shape.counts) == 1:
        return lambda x, weight: torch.nn.functional.linear(x, weight[0])
    return lambda x, weight: grouped_bf16.grouped_matmul(x, weight, list(shape.counts))


@torch.no_grad()
def _forward(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, where: gpu.Place) -> float:
    return where.seconds(lambda: product(x.detach(), weight.detach()))


@torch.no_grad()
def _operands_ready(name: str, shape: Shape, x: Tensor, weight: Tensor, where: gpu.Place) -> float | None:
    """Seconds of the product of codes that are there; None for a back end that multiplies no codes."""
    if name == backends.EMULATED:
        return None
    multiply = backends.module(name).multiply
    groups = Groups(shape.counts)
    weights = WeightCodes(weight.detach()).forwards
    pairs = list(zip(rows_of(casts().cast_rows(x.detach()), groups), weights, strict=True))
    return where.seconds(lambda: multiply(pairs, x.dtype))


def _map(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(product(x, weight), (x, weight), grad)


def _cells(
    shape: Shape, who: str, product: float | None, whole: float, base_product: float, base_map: float
) -> tuple[str, ...]:
    rate = "-" if product is None else f"{shape.flop / product / 1e12:.4g}"
    to_bf16 = "-" if product is None else f"{base_product / product:.2f}"
    return shape.name, who, rate, to_bf16, f"{whole * 1e3:.3f}", f"{base_map / whole:.2f}", "-"


def tiny(config: ModelConfig) -> ModelConfig:
    """The same maps at sizes that show on a CPU that the program runs."""
    return replace(
        config, hidden_size=128, q_lora_rank=64, num_attention_heads=4, head_dim=64, o_groups=2, o_lora_rank=32,
        moe_intermediate_size=128,
    )  # fmt: skip
