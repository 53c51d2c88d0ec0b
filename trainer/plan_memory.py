"""Bytes of one rank by part: what it holds throughout, what a row adds, what the update adds; without torch.

Held by tests/trainer/test_plan_memory.py to the objects that the ranks of small meshes build, and to what a row and an
update really take.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from model.config import AttentionMode
from model.inventory import TensorSpec, released_tensors
from model.logical import locate, parameter_shapes
from optim.groups import Member
from optim.iterations import BATCH_ELEMENTS
from optim.zero import shape_of
from trainer.config import TrainConfig
from trainer.parallel.stages import Part
from trainer.plan_codes import ON_GPU, beside_weights
from trainer.precision.config import Precision
from trainer.precision.recipe import Recipe

DTYPE_BYTES: dict[Precision, int] = {"fp64": 8, "fp32": 4, "bf16": 2}
FP32_BYTES = 4
FP64_BYTES = 8
INT64_BYTES = 8

Elements = Counter[tuple[str, bool]]
"""Numbers of elements by kind, and by whether they are of an island, which is held in at least fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank.

    Held throughout: weights, parameters in the run's type (islands at least fp32), router biases and hash tables, and
    the codes of weights where a back end on a GPU is named; masters, fp32 copies of own parameters of lower precision;
    momentum, Muon's, of own matrices; moments, AdamW's two, of what else is owned; sums, accumulators of all gradients
    that are made here. Of a row: activations, what its forward pass keeps, in a pipeline that of all rows in flight;
    gradients, those that wait for the end of its backward pass; row, the most of all that at a time, working memory
    included. Then: buffers, gradients on their way (fast path) and what streams arrive in; update, the reduced
    gradients and the optimizer's temporary copies.
    """

    weights: int
    masters: int
    momentum: int
    moments: int
    sums: int
    activations: int
    gradients: int
    row: int
    buffers: int
    update: int

    @property
    def held(self) -> int:
        """What is there throughout."""
        return self.weights + self.masters + self.momentum + self.moments + self.sums

    @property
    def total(self) -> int:
        """What is held and, as the update follows the rows, the larger of the two; gradients arrive in between."""
        return self.held + max(self.row, self.buffers + self.update)

    def parts(self) -> dict[str, int]:
        """By name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """A model's tensors, or those of a part of it, as this file counts them.

    shapes, groups: of whole parameters. islands: their names. dense: elements outside the experts. expert: shape of an
    expert's matrix (another has it transposed). matrices: of one expert in all layers. buffers: bytes without gradient.
    codes: bytes beside a rank's weights, where a back end on a GPU is named.
    """

    shapes: dict[str, tuple[int, ...]]
    groups: dict[str, str]
    islands: frozenset[str]
    dense: Elements
    expert: tuple[int, int]
    matrices: int
    buffers: int
    codes: int

    @property
    def expert_elements(self) -> int:
        """Of one expert in all layers."""
        return self.matrices * math.prod(self.expert)


def tensors(config: TrainConfig, part: Part) -> Tensors:
    """Those that a pipe rank holds."""
    model, element_bytes = config.model, DTYPE_BYTES[config.precision.dtype]
    here = [spec for spec in released_tensors(model, experts=1) if part.holds(spec.name)]
    shapes = {name: shape for name, shape in parameter_shapes(model).items() if part.holds(name)}
    specs = [spec for spec in here if spec.kind != "buffer"]
    dense, experts = Elements(), [spec for spec in specs if spec.group == "experts"]
    for spec in specs:
        if spec.group != "experts":
            dense[spec.kind, spec.is_island] += spec.size
    return Tensors(
        shapes=shapes,
        groups={locate(spec.name).parameter: spec.group for spec in specs},
        islands=frozenset(spec.name for spec in specs if spec.is_island),
        dense=dense,
        expert=(model.moe_intermediate_size, model.hidden_size),
        matrices=len(experts),
        buffers=sum(_buffer_bytes(spec, element_bytes) for spec in here),
        codes=beside_weights(config, shapes) if config.precision.backend in ON_GPU else 0,
    )


def _buffer_bytes(spec: TensorSpec, element_bytes: int) -> int:
    if spec.kind != "buffer":
        return 0
    return spec.size * (INT64_BYTES if spec.stored == "I64" else max(element_bytes, FP32_BYTES))


def is_trained(group: str, mode: AttentionMode) -> bool:
    """True where a step in this mode trains a group of parameters, as `trainer.step.frozen_groups` has it."""
    return mode == "sparse" or (group == "indexer") == (mode == "indexer_warmup")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMemory:
    """Of the rows that a rank has under way, the same on all with the same layers; see `Memory`. most: its `row`.

    arriving: what the streams of a pipeline arrive in, where that stays.
    """

    activations: int
    gradients: int
    most: int
    arriving: int = 0


def memory(config: TrainConfig, model: Tensors, owned: Sequence[Member], experts: int, row: RowMemory) -> Memory:
    """Of a rank that owns these dense members and so many experts' matrices, with rows that take so much."""
    mesh, width = config.parallel.mesh, DTYPE_BYTES[config.precision.dtype]
    state, exact = max(width, FP32_BYTES), config.parallel.reduction == "exact"
    here = model.dense + Elements({("matrix", False): _held(config, model)})
    in_experts = experts * math.prod(model.expert)
    own = _elements(model, owned) + Elements({("matrix", False): in_experts})
    matrices = sum(size for (kind, _), size in own.items() if kind == "matrix")
    lower = (
        sum(size for (_, island), size in own.items() if not island)
        if width < state
        else _rounded(config, model, owned, in_experts)
    )
    return Memory(
        weights=_bytes(here, width) + model.buffers + model.codes,
        masters=lower * state,
        momentum=matrices * state,
        moments=2 * (own.total() - matrices) * state,
        sums=here.total() * (INT64_BYTES if exact else state),
        activations=row.activations,
        gradients=row.gradients,
        row=row.most,
        buffers=row.arriving + (0 if exact or mesh.size == 1 else _on_their_way(config, model, owned, experts)),
        update=_update(model, owned, experts, own, state, in_place=_in_place(config, own, in_experts)),
    )


def _rounded(config: TrainConfig, model: Tensors, owned: Sequence[Member], in_experts: int) -> int:
    """Own elements that at some time are rounded to a format, and so have a master in a run's type of fp32, too."""
    rounded = Recipe(config.precision, config.model).rounded()
    dense = _elements(model, [member for member in owned if member.parameter in rounded]).total()
    return dense + (in_experts if any(model.groups.get(name) == "experts" for name in rounded) else 0)


def _held(config: TrainConfig, model: Tensors) -> int:
    """Elements of the experts that are here."""
    return config.model.n_routed_experts // config.parallel.expert * model.expert_elements


def _elements(model: Tensors, members: Sequence[Member]) -> Elements:
    found = Elements()
    for member in members:
        found[member.kind, member.parameter in model.islands] += math.prod(shape_of(member, model.shapes))
    return found


def _bytes(elements: Elements, width: int) -> int:
    """In the model's type, islands in at least fp32."""
    return sum(size * (max(width, FP32_BYTES) if island else width) for (_, island), size in elements.items())


def _on_their_way(config: TrainConfig, model: Tensors, owned: Sequence[Member], experts: int) -> int:
    """Fast path: what leaves for the owners and what comes from the others, kept until the next step begins."""
    mesh, fp64 = config.parallel.mesh, config.precision.dtype == "fp64"
    dense = FP64_BYTES if fp64 else DTYPE_BYTES[config.parallel.dense_reduction]
    of_experts, replicas = FP64_BYTES if fp64 else DTYPE_BYTES["bf16"], mesh.data // mesh.expert
    total = 0
    if mesh.owners > 1:
        total += dense * (model.dense.total() + mesh.owners * _elements(model, owned).total())
    if replicas > 1:
        total += of_experts * (_held(config, model) + replicas * experts * math.prod(model.expert))
    return total


def _in_place(config: TrainConfig, own: Elements, in_experts: int) -> int:
    """Own elements whose sums are the reduced gradients: on the fast path, those that no other rank has sums of."""
    mesh = config.parallel.mesh
    if config.parallel.reduction == "exact":
        return 0
    dense = own.total() - in_experts if mesh.data == 1 else 0
    return dense + (in_experts if mesh.data == mesh.expert else 0)


def _update(model: Tensors, owned: Sequence[Member], experts: int, own: Elements, state: int, *, in_place: int) -> int:
    """The reduced gradients, and the most that the optimizer adds at a time: a clipped copy and what follows it."""
    matrices = Counter(shape_of(member, model.shapes) for member in owned if member.kind == "matrix")
    matrices[model.expert] += experts
    others = [math.prod(shape_of(member, model.shapes)) for member in owned if member.kind != "matrix"]
    in_matrices = sum(size for (kind, _), size in own.items() if kind == "matrix")
    gradients, directions = own.total() * state, in_matrices * state
    changes = (own.total() - in_matrices) * state
    largest = max([math.prod(shape) for shape, number in matrices.items() if number] + others, default=0)
    # Squares of one member, in fp64 and padded; directions of all matrices and one batch on its way; changes of all
    # others, and of one its squares.
    norm = 2 * FP64_BYTES * largest
    batch = max(_batch(shape, number) for shape, number in matrices.items()) * state
    rest = max(others, default=0) * 2 * FP64_BYTES
    return gradients - in_place * state + max(norm, gradients + max(directions + batch, changes + rest))


def _batch(shape: tuple[int, ...], number: int) -> int:
    """Elements of the stack, of its iterates and of two squares while a batch of such matrices is orthogonalised."""
    at_a_time = min(number, max(1, BATCH_ELEMENTS // math.prod(shape)))
    return at_a_time * (3 * math.prod(shape) + 2 * min(shape) ** 2)
