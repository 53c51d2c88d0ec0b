"""Bytes of codes that products with formats keep: of their inputs, and beside weights. Without torch.

By the back end that the configuration names. `auto`, which the device decides, counts as emulated: a plan knows no
device, and says so in a line. Held by tests/trainer/test_plan_codes.py to what the back ends keep.
"""

import math
from collections.abc import Mapping, Sequence

from model.count_kept import FP32_BYTES, Copy, Inputs
from model.logical import parameter_shapes
from trainer.config import TrainConfig
from trainer.parallel.stages import parts, usual_row
from trainer.precision.config import BackEnd
from trainer.precision.recipe import Formats, Recipe

ON_GPU: tuple[BackEnd, ...] = ("torch", "te")
"""Back ends of `trainer.precision.products`."""
SIDE, MX_SIDE = 128, 32
"""Of blocks for Hopper and for Blackwell."""
OUTER, QUAD = 16, 4
"""Multiples that the other dim, and a row of scales, is filled up to."""


def note(config: TrainConfig) -> str:
    """What the plan counts of codes, in a line; "" where no product has formats."""
    shapes, backend = parameter_shapes(config.model), config.precision.backend
    ranks = parts(config.parallel, config.model, usual_row(config.schedule))
    size = max(beside_weights(config, {name: shapes[name] for name in shapes if part.holds(name)}) for part in ranks)
    if not size:
        return ""
    if backend in ON_GPU:
        return f"{backend} keeps up to {size:,} bytes of codes on a rank, which are counted with its weights"
    if backend == "emulated" or config.device == "cpu" or config.precision.dtype == "fp64":
        return "rows keep what the emulated back end keeps of them"
    return (
        "rows keep what the emulated back end keeps of them; if auto takes another on a GPU, that keeps up to "
        f"{size:,}\nbytes of codes beside a rank's weights, too, which are counted where it is named"
    )


def inputs(config: TrainConfig, tokens: int, element_bytes: int) -> Inputs:
    """What the products of a step that begins after `tokens` keep of their inputs, in a model of so wide numbers."""
    mesh, on_gpu = config.parallel.mesh, config.precision.backend in ON_GPU
    rows = mesh.expert if config.parallel.reduction == "exact" else 1
    table = Recipe(config.precision, config.model).at(tokens)
    copies = {
        name: _on_gpu(formats) if on_gpu else _emulated(formats, element_bytes, in_experts=".ffn.experts." in name)
        for name, formats in table.items()
        if not formats.has_plain_products
    }
    return Inputs(
        copies={name: copy for name, copy in copies.items() if copy is not None},
        matrices=config.model.n_routed_experts // mesh.expert * rows,
    )


def _on_gpu(formats: Formats) -> Copy:
    """As `trainer.precision.products` keeps it: as the first product had it, filled up only where it is multiplied."""
    block = formats.input.block if formats.input else (1, SIDE)
    return Copy(number_bytes=1, block=block, side=block[1])


def _emulated(formats: Formats, element_bytes: int, *, in_experts: bool) -> Copy | None:
    """As `trainer.precision.emulated` keeps it for the gradient of the weight, experts' rows in whole blocks."""
    blocks = [one.block[0] for one in (formats.wgrad_input, formats.wgrad_grad) if one and in_experts]
    side, format = math.lcm(*blocks), formats.wgrad_input
    if format is not None:
        return Copy(number_bytes=1, block=format.block, side=side, filled=True)
    if formats.input is None and side == 1:
        return None
    return Copy(number_bytes=element_bytes, block=None, side=side, filled=True)


def beside_weights(config: TrainConfig, shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of the operands that a back end on a GPU makes of these parameters, of the experts those of a rank."""
    recipe, coded = Recipe(config.precision, config.model), dict[str, Formats]()
    for start in recipe.stages:
        coded |= {name: formats for name, formats in recipe.at(start).items() if not formats.has_plain_products}
    held = config.model.n_routed_experts // config.parallel.expert
    total = 0
    for name in shapes.keys() & coded.keys():
        *stack, rows, columns = shapes[name]
        matrices = held if stack else 1
        if name.endswith(".attn.wo_a.weight"):
            matrices, rows = config.model.o_groups, rows // config.model.o_groups
        total += matrices * (_blackwell if coded[name].dgrad_weight else _hopper)(rows, columns)
    return total


def _hopper(rows: int, columns: int) -> int:
    """Of one matrix, as `trainer.precision.operands.WeightCodes` has it: for y and for dx, scales of blocks in fp32."""
    tall, wide = -(-rows // SIDE), -(-columns // SIDE)
    forwards, backwards = _up(rows, OUTER) * _up(columns, SIDE), _up(columns, OUTER) * _up(rows, SIDE)
    # What is filled up is a copy beside the codes that it was made of.
    made = rows * columns if forwards > rows * columns else 0
    scales = FP32_BYTES * (tall * _up(wide, QUAD) + wide * _up(tall, QUAD)) + tall * wide
    return made + forwards + backwards + scales


def _blackwell(rows: int, columns: int) -> int:
    """As `trainer.precision.mx.MxWeight` has it: W for y and, rounded across, for dx; scales are a byte."""
    tall, wide = _up(rows, MX_SIDE), _up(columns, MX_SIDE)
    scales = _up(rows, SIDE) * _up(wide // MX_SIDE, QUAD) + _up(columns, SIDE) * _up(tall // MX_SIDE, QUAD)
    return 2 * tall * wide + scales


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
