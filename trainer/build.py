"""From configuration to the parts of a step: model, optimizer, sums, in the order that matters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.config import Report
from data.open import Data, open_data
from data.stream import Segment
from model import names
from model.config import AttentionMode
from model.init import initialize
from model.logical import logical_tensors, parameter_shapes
from model.transformer import Transformer
from optim import groups
from optim.optimizer import Optimizer
from trainer import holding, schedule
from trainer.config import TrainConfig
from trainer.device import DTYPES
from trainer.members import members
from trainer.parallel.apply import apply_kernels, choose_kernels
from trainer.parallel.expert import apply_experts
from trainer.parallel.fast import Dtypes, EarlyHandout, FastSum
from trainer.parallel.owners import ExactReduction, Handout, Ownership
from trainer.parallel.stages import chunk_layers, layers_of_rank, usual_row
from trainer.parallel.world import ALONE, World
from trainer.pieces import Piece, whole
from trainer.pool import RowPool
from trainer.precision import backends
from trainer.precision.recipe import Recipe
from trainer.precision.serving import Precision
from trainer.precision.table import render
from trainer.precision.weights import Weights
from trainer.precision.wire import Wire
from trainer.reader import Reader, restore
from trainer.released.begin import begin
from trainer.schedule import StepPlans
from trainer.schedule_config import ScheduleConfig
from trainer.step import Parts

if TYPE_CHECKING:
    from trainer.parallel.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """Everything a loop needs. plans: what each step does, by number. table: which optimizer
    updates what, and which formats parameters have, as text."""

    config: TrainConfig
    data: Data
    parts: Parts
    plans: StepPlans
    table: str

    def tensors(self) -> dict[str, Tensor]:
        """What this rank has of a checkpoint: the model's parameters and buffers, the state of what it owns."""
        of_model = {f"model/{name}": tensor for name, tensor in names.tensors(self.parts.model).items()}
        return of_model | {f"optimizer/{name}": value for name, value in self.parts.optimizer.state_dict().items()}

    def pieces(self) -> dict[str, list[Piece]]:
        """What this rank writes of a checkpoint: all ranks together write every row once."""
        return holding.written(self.parts)

    def named_tensors(self) -> dict[str, Tensor]:
        """`tensors` and what else has a name: the sums of the gradients."""
        return self.tensors() | {f"sums/{name}": total for name, total in self.parts.sums.totals().items()}

    def restore(self, saved: Reader) -> None:
        """Read this rank's part of a checkpoint, written by any ranks.

        Raises ValueError unless names, shapes and dtypes are those of this run.
        """
        restore(saved, holding.held(self.parts), holding.names_of_all(self.parts))

    def enter(self, done: int, *, anew: bool) -> None:
        """Take up the formats of the step after `done` steps; anew: those of the restored weights may be others."""
        self.parts.precision.enter(schedule.after(self.plans[done - 1]) if done else 0)
        if anew:
            rounded = self.parts.precision.weights.recipe.rounded()
            self.parts.optimizer.write(rounded)
            self.parts.handout.begin(
                {name: tensor.detach() for name, tensor in names.tensors(self.parts.model).items()}, rounded
            )


def restore_model(model: Transformer, saved: Reader) -> None:
    """Read the tensors named model/... of a checkpoint into the model.

    Raises ValueError unless names, shapes and dtypes are the model's.
    """
    tensors = {f"model/{name}": tensor for name, tensor in names.tensors(model).items()}
    restore(saved, whole(tensors), tensors.keys(), prefix="model/")


def attention_after(config: ScheduleConfig, done: int) -> AttentionMode:
    """The attention mode of the last step done (of the first, before any)."""
    return schedule.plan(config)[max(done - 1, 0)].attention


def read_data(config: TrainConfig, report: Report) -> Data:
    """Open the data of the run; ValueError where the tokenizer has ids that the model has no rows for."""
    segments = [Segment(row_length=length, rows=rows) for length, rows in schedule.segments(config.schedule)]
    data = open_data(config.data, segments, config.seed, report)
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size}: expected at least the {data.tokenizer.vocab_size} "
            f"entries of the tokenizer (data.tokenizer.kind={config.data.tokenizer.kind})"
        )
    return data


def build(
    config: TrainConfig, data: Data, device: torch.device, world: World = ALONE, *, begins: bool = False
) -> Built:
    """Make the model with its initial values on the device, its views with their kernels, then optimizer and sums.

    On many ranks each makes the part that it holds, and an optimizer of what it owns. begins: the initial values are
    those of `config.init.weights`, if it names some.
    """
    model = build_model(config, device, world, begins=begins)
    exact = config.parallel.reduction == "exact"
    if world.expert.size > 1:
        apply_experts(model, world.expert, exact=exact)
    shared = {name: tensor for name, tensor in model.named_parameters() if names.alias_of(name) is None}
    every, shapes = members(logical_tensors(config.model)), parameter_shapes(config.model)
    ownership = Ownership(every, shapes, model, world)
    pool = RowPool(model, config.threads if device.type == "cpu" else 1)
    for view in pool.views:
        apply_kernels(view, choose_kernels(config, device))
    if config.recompute:
        from trainer.parallel.recompute import apply_recompute

        for view in pool.views:
            apply_recompute(view, config.recompute)
    sums = _sums(config, {name: tensor.shape for name, tensor in shared.items()}, ownership, device)
    if isinstance(sums, FastSum):
        sums.watch(model)
    recipe = Recipe(config.precision, config.model)
    weights, backend = Weights(recipe), backends.of_run(config.precision, recipe, device)
    groups_here = {member.parameter: member.group for member in every}
    optimizer = Optimizer(
        {ownership.key(span): ownership.rows(span, shared[span.parameter].detach()) for span in ownership.spans},
        ownership.members(),
        config.optim,
        pool.plain_map,
        known={member.group for member in every},
        totals=world.totals,
        counted=ownership.counted(),
        of_master=weights.of_master,
        rounded=weights.recipe.rounded(),
    )
    ways = ownership, Wire(weights), optimizer.master
    parts = Parts(
        pool=pool,
        optimizer=optimizer,
        sums=sums,
        handout=Handout(*ways) if exact else EarlyHandout(*ways, model),
        stream=data.train,
        loss=config.loss,
        groups=groups_here,
        precision=Precision(weights, pool.views, groups_here, backend),
        device=device,
        world=world,
        ownership=ownership,
        pipeline=_pipeline(config, model, world) if config.parallel.pipe > 1 else None,
    )
    if device.type != "meta":
        for member, view in ownership.held():
            weights.round(member.parameter, view(shared[member.parameter].detach()))
    table = "\n".join([groups.table(every, shapes, config.optim), *_formats(config, recipe)])
    return Built(config=config, data=data, parts=parts, plans=schedule.plan(config.schedule), table=table)


def _formats(config: TrainConfig, recipe: Recipe) -> list[str]:
    """The table of formats, where there are any."""
    return [] if recipe.is_plain else [render(config.precision, config.model, DTYPES[config.precision.dtype].itemsize)]


def _pipeline(config: TrainConfig, model: Transformer, world: World) -> "Pipeline":
    """The schedule of this rank's stage; its model relays streams from now on."""
    from trainer.parallel.pipeline import pipeline

    parallel = config.parallel
    chunks = chunk_layers(parallel, config.model, usual_row(config.schedule))
    travels = torch.bfloat16 if parallel.stream == "bf16" else model.dtype
    made = pipeline(model, parallel.schedule, chunks, world.column, travels)
    model.relay = made.relay
    return made


def _sums(
    config: TrainConfig, shapes: Mapping[str, torch.Size], ownership: Ownership, device: torch.device
) -> ExactReduction | FastSum:
    """What adds the gradients, as `config.parallel.reduction` says."""
    fp64 = config.precision.dtype == "fp64"
    plain = torch.float64 if fp64 else torch.float32
    if config.parallel.reduction == "exact":
        return ExactReduction(shapes, ownership, dtype=plain, device=device)
    dense = torch.bfloat16 if config.parallel.dense_reduction == "bf16" and not fp64 else plain
    dtypes = Dtypes(sums=plain, dense=dense, experts=plain if fp64 else torch.bfloat16)
    return FastSum(shapes, ownership, dtypes=dtypes, seed=config.seed, device=device)


def build_model(
    config: TrainConfig, device: torch.device, world: World = ALONE, *, begins: bool = False
) -> Transformer:
    """The model, or the part that this rank holds, with its initial values, on the device; on `meta` sizes alone."""
    number, share = config.model.n_routed_experts, world.place.expert
    each = number // world.mesh.expert
    held = range(share * each, (share + 1) * each)
    chunks = layers_of_rank(config.parallel, config.model, usual_row(config.schedule), world.place.pipe)
    layers = [number for chunk in chunks for number in chunk]
    with device:
        model = Transformer(config.model, DTYPES[config.precision.dtype], held, layers)
    if device.type != "meta":
        initialize(model, config.init, config.seed)
    if begins and config.init.weights:
        begin(model, config.init.weights)
    return model
