"""What a rank gives to a checkpoint and takes from one: whole tensors, or ranges of their rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.manifest import DTYPES, CheckpointError, check_rows, count_rows, data_file, key

_RESERVED = "__metadata__"
"""The one name that a safetensors header keeps for itself."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Piece:
    """Rows `start` and those after it, as many as `tensor` has, of a tensor whose whole shape is `shape`.

    A row is an index of dimension 0; a tensor without dimensions is one row.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + count_rows(self.tensor.shape)


Pieces = Mapping[str, Sequence[Piece]]
"""A rank's pieces by the name of the tensor; between the pieces of one tensor may be rows of other ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What a rank will write of one tensor: the shape is of the whole; spans are its rows, as (start, stop)."""

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def whole(tensors: Mapping[str, Tensor]) -> dict[str, list[Piece]]:
    """Each tensor as one piece."""
    return {name: [Piece(tensor=tensor, shape=tuple(tensor.shape))] for name, tensor in tensors.items()}


def outline(pieces: Pieces) -> dict[str, Outline]:
    """What one rank will write; raises CheckpointError where a piece is none of its tensor or cannot be saved."""
    outlines, keys = {}, {_RESERVED}
    for name, parts in pieces.items():
        if not parts:
            continue
        for piece in parts:
            _check(name, piece)
            if (of_piece := key(name, piece.shape, piece.start, piece.stop)) in keys:
                raise CheckpointError(f"tensor {of_piece}: expected another name, this one is taken")
            keys.add(of_piece)
        kinds = {(dtype_name(piece.tensor), tuple(piece.shape)) for piece in parts}
        if len(kinds) != 1:
            raise CheckpointError(f"tensor {name}: expected pieces of one dtype and shape, these are {sorted(kinds)}")
        dtype, shape = kinds.pop()
        spans = tuple((piece.start, piece.stop) for piece in parts)
        outlines[name] = Outline(dtype=dtype, shape=shape, spans=spans)
    return outlines


def check_ranks(of_ranks: Iterable[Mapping[str, Outline]]) -> None:
    """Raises CheckpointError unless the ranks' pieces of each tensor are of one kind and hold each row once."""
    first: dict[str, tuple[Outline, str]] = {}
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for rank, outlines in enumerate(of_ranks):
        file = data_file(rank)
        for name, mine in outlines.items():
            other, where = first.setdefault(name, (mine, file))
            if (mine.dtype, mine.shape) != (other.dtype, other.shape):
                raise CheckpointError(
                    f"tensor {name}: is {other.dtype} {list(other.shape)} for {where} and "
                    f"{mine.dtype} {list(mine.shape)} for {file}: expected one dtype and shape"
                )
            spans.setdefault(name, []).extend((start, stop, file) for start, stop in mine.spans)
    for name, (outlined, _) in first.items():
        try:
            check_rows(name, outlined.shape, spans[name])
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def dtype_name(tensor: Tensor) -> str:
    """float32 and so on."""
    return str(tensor.dtype).removeprefix("torch.")


def byte_view(name: str, tensor: Tensor) -> np.ndarray:
    """The tensor's bytes, uint8 [n], without a copy where it is contiguous on the CPU; raises CheckpointError."""
    _check_dtype(name, tensor)
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _check_dtype(name: str, tensor: Tensor) -> None:
    if dtype_name(tensor) not in DTYPES:
        raise CheckpointError(f"tensor {name}: {tensor.dtype} cannot be saved, expected one of {', '.join(DTYPES)}")


def _check(name: str, piece: Piece) -> None:
    _check_dtype(name, piece.tensor)
    mine, of_whole = tuple(piece.tensor.shape), tuple(piece.shape)
    inside = 0 <= piece.start <= piece.stop <= count_rows(of_whole)
    if len(mine) != len(of_whole) or mine[1:] != of_whole[1:] or not inside:
        raise CheckpointError(f"tensor {name}: {list(mine)} from row {piece.start} is no part of {list(of_whole)}")
