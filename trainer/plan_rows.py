"""Bytes of the rows that a rank has under way, from the configuration alone; without torch.

A row is counted as `model.count_memory` counts it, in the layers of each chunk. Of a pipeline's rows several are in
flight, as many as its schedule (`trainer.parallel.orders`) has, and one of them is on its way back.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from model.config import AttentionMode, ModelConfig
from model.count_kept import Inputs
from model.count_memory import kept_bytes, phases
from trainer.config import Recomputed, TrainConfig
from trainer.parallel.orders import training_order
from trainer.parallel.simulate import kept
from trainer.parallel.stages import Part
from trainer.plan_codes import inputs
from trainer.plan_memory import DTYPE_BYTES, FP32_BYTES, RowMemory, Tensors, is_trained
from trainer.schedule import StepPlan

ROWS_PER_RANK = 4
"""Rows for each pipe rank after which no more are in flight than before."""


def activations(config: TrainConfig, step: StepPlan) -> dict[str, int]:
    """Bytes kept of a row of this step by part, in all layers.

    With expert parallelism as many token-expert pairs arrive as are sent, if the load is even.
    """
    return kept_bytes(*_pass(config, step))


def _pass(
    config: TrainConfig, step: StepPlan
) -> tuple[ModelConfig, int, AttentionMode, tuple[Recomputed, ...], int, Inputs]:
    width = DTYPE_BYTES[config.precision.dtype]
    return (
        config.model,
        step.row_length,
        step.attention,
        config.recompute,
        width,
        inputs(config, step.tokens, width),
    )


def stream_bytes(config: TrainConfig, row_length: int) -> int:
    """What travels between pipe ranks for a row: the streams [1, T, N, D], in the type that they travel in."""
    width = DTYPE_BYTES["bf16" if config.parallel.stream == "bf16" else config.precision.dtype]
    return row_length * config.model.hc_mult * config.model.hidden_size * width


def rows_of_column(config: TrainConfig, step: StepPlan) -> int:
    """Rows that the ranks with the most rows take one after the other; in a pipeline, its micro-batches."""
    return -(-step.rows // config.parallel.data)


def row_memory(config: TrainConfig, model: Tensors, step: StepPlan, part: Part) -> RowMemory:
    """Of a row of this step; in a pipeline, of all rows that are in flight, one of them on its way back."""
    chunks = [
        replace(part, chunks=(number,), layers=(of,)) for number, of in zip(part.chunks, part.layers, strict=True)
    ]
    rows = [_chunk_memory(config, model, step, chunk) for chunk in chunks]
    return rows[0] if config.parallel.pipe == 1 else _in_flight(config, step, part, rows)


def _in_flight(config: TrainConfig, step: StepPlan, part: Part, rows: Sequence[RowMemory]) -> RowMemory:
    """Of as many rows as the schedule has in flight in each chunk, with the streams that came and went for them."""
    parallel, size = config.parallel, stream_bytes(config, step.row_length)
    first, last = 0, parallel.chunks - 1
    # A layer keeps its streams, which are those that came, unless they have to be cast or nothing is kept.
    same = parallel.stream == "model" and step.attention != "indexer_warmup"
    waiting: dict[int, int] = {}
    passing: dict[int, int] = {}
    for chunk, row in zip(part.chunks, rows, strict=True):
        turned = chunk == parallel.pipe and parallel.chunks > parallel.pipe
        came = 0 if chunk == first else -size * same if turned else size * (not same)
        went = 0 if chunk == last else size
        waiting[chunk] = row.activations + came + went
        passing[chunk] = row.most + came + went
    order = training_order(
        parallel.schedule,
        parallel.pipe,
        part.chunks[0],
        min(rows_of_column(config, step), ROWS_PER_RANK * parallel.pipe),
    )
    # DeepSpeed keeps what streams and gradients arrive in: one tensor in 1F1B, from which they are copied; in DualPipeV
    # those that came last, one on each way.
    arriving = size * len(part.chunks)
    return RowMemory(
        activations=kept(order, waiting),
        gradients=max(row.gradients for row in rows),
        most=kept(order, waiting, passing) + arriving,
        arriving=arriving,
    )


def _leaves(config: TrainConfig, model: Tensors, step: StepPlan, part: Part) -> Iterator[tuple[str, int]]:
    """Bytes of each gradient that a row leaves here, one for each use of a shared weight.

    Experts' are of every row of the expert group on the exact path, of all of them together on the fast one.
    """
    mesh, width = config.parallel.mesh, DTYPE_BYTES[config.precision.dtype]
    rows = mesh.expert if config.parallel.reduction == "exact" else 1
    for name, shape in model.shapes.items():
        if not is_trained(model.groups[name], step.attention):
            continue
        held = max(width, FP32_BYTES) if name in model.islands else width
        size = math.prod(shape) * held
        size = rows * size // mesh.expert if model.groups[name] == "experts" else size
        shared = name in ("embed.weight", "head.weight") and part.branches > 0
        uses = (name, f"mtp.0.{name}") if shared else (name,)
        yield from ((use, size) for use in uses if part.uses(use))


def _chunk_memory(config: TrainConfig, model: Tensors, step: StepPlan, chunk: Part) -> RowMemory:
    """Of a row in one chunk: phase by phase its activations go and its gradients come.

    On the fast path a gradient goes into its sum as it comes.
    """
    exact = config.parallel.reduction == "exact"
    rows = config.parallel.mesh.expert if exact else 1
    order = phases(*_pass(config, step), apart=rows, layers=chunk.layers[0])
    leaves = dict(_leaves(config, model, step, chunk))
    kept = left = sum(phase.kept.total() for phase in order)
    come = most = 0
    for phase in order:
        found = {name: size for name, size in leaves.items() if name.startswith(phase.trains)}
        passing = 0 if exact else max(found.values(), default=0)
        # While the first row passes, the others' of w2 are not there yet; while the last does, theirs of w1 and w3 are.
        others = sum(size for name, size in found.items() if ".experts." in name) * (rows - 1) // rows
        waiting = max(phase.first - others // 2, phase.last + others) if phase.first else 0
        most = max(most, left + come + phase.again + phase.working + passing + waiting)
        left, come = left - phase.kept.total(), come + (sum(found.values()) if exact else 0)
    gradients = sum(leaves.values()) if exact else max(leaves.values(), default=0)
    return RowMemory(activations=kept, gradients=gradients, most=max(most, come))
