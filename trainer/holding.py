"""A checkpoint's tensors on one rank: which rows it holds, and which of these it writes for all.

Weights are held by every rank that computes with them and written by their owner; optimizer state is its owner's alone.
Of owners of the same dense rows (`Mesh.same_owner_group`) the first writes; buffers are for the first data rank to
write, and what two stages have for the first stage.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import names
from optim.groups import Span
from trainer.parallel.owners import EXPERTS
from trainer.pieces import Piece
from trainer.step import Parts


def held(parts: Parts) -> dict[str, list[Piece]]:
    """All that this rank restores from a checkpoint: its part of the model, and the state of what it owns."""
    ownership = parts.ownership
    pieces: dict[str, list[Piece]] = {}
    for name, tensor in names.tensors(parts.model).items():
        is_parameter = name in parts.groups
        shape = ownership.whole_shape(name) if is_parameter else tuple(tensor.shape)
        first = ownership.first_row(name) if is_parameter else 0
        pieces[f"model/{name}"] = [Piece(tensor=tensor.detach(), shape=shape, start=first)]
    for name, _, piece in _state(parts):
        pieces.setdefault(name, []).append(piece)
    return pieces


def written(parts: Parts) -> dict[str, list[Piece]]:
    """All that this rank writes into a checkpoint."""
    ownership, world, pieces = parts.ownership, parts.world, dict[str, list[Piece]]()
    tensors = names.tensors(parts.model)
    for name, tensor in tensors.items():
        if name not in parts.groups and world.place.data == 0:
            pieces[f"model/{name}"] = [Piece(tensor=tensor, shape=tuple(tensor.shape))]
    for span in ownership.spans:
        if _writes(parts, span):
            rows = ownership.rows(span, tensors[span.parameter].detach())
            piece = Piece(tensor=rows, shape=ownership.whole_shape(span.parameter), start=span.start)
            pieces.setdefault(f"model/{span.parameter}", []).append(piece)
    for name, span, piece in _state(parts):
        if _writes(parts, span) and (piece.tensor.dim() > 0 or span.start == 0):
            pieces.setdefault(name, []).append(piece)
    return pieces


def names_of_all(parts: Parts) -> set[str]:
    """The names of a whole checkpoint, whoever holds its tensors; all ranks call this alike."""
    found = {f"model/{name}" for name in names.tensors(parts.model)}
    parameters, rounded = dict(parts.model.named_parameters()), parts.precision.weights.recipe.rounded()
    for name, kind in parts.ownership.kinds.items():
        if name not in parameters:
            continue
        state = {"momentum"} if kind == "matrix" else {"exp_avg", "exp_avg_sq", "updates"}
        if name in rounded or parameters[name].dtype not in (torch.float32, torch.float64):
            state.add("master")
        found |= {f"optimizer/{one}/{name}" for one in state}
    return set().union(*parts.world.gather(found))


def _state(parts: Parts) -> Iterator[tuple[str, Span, Piece]]:
    """Name in a checkpoint, span and piece of everything in this rank's optimizer.

    A number that a parameter has once, its count of updates, is a piece of each of its spans.
    """
    ownership = parts.ownership
    spans = {ownership.key(span): span for span in ownership.spans}
    for name, tensor in parts.optimizer.state_dict().items():
        kind, _, key = name.partition("/")
        span = spans[key]
        yield f"optimizer/{kind}/{span.parameter}", span, _piece(ownership.whole_shape(span.parameter), span, tensor)


def _piece(shape: tuple[int, ...], span: Span, tensor: Tensor) -> Piece:
    return Piece(tensor=tensor, shape=shape, start=span.start) if tensor.dim() else Piece(tensor=tensor, shape=())


def _writes(parts: Parts, span: Span) -> bool:
    if parts.ownership.is_told_elsewhere(span.parameter):
        return False
    return parts.groups[span.parameter] == EXPERTS or parts.world.same_owners.index == 0
