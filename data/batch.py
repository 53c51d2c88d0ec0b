"""Batch: packed rows with their targets, documents and positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOT_LEARNED = -1
PADDING_DOCUMENT = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows ready for the model; all int64.

    token_BT: ids, the padding id at the row's end. target_BT: the next token of the same document, also when it lies
    in another row; -1 where none is learned (end of document, prompt, padding). document_BT: 0, 1, 2, ... by piece, -1
    for padding. position_BT: from 0 in every piece, and from 0 in the padding. source_B: the source's number.
    """

    token_BT: Tensor
    target_BT: Tensor
    document_BT: Tensor
    position_BT: Tensor
    source_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokenised documents: document d is tokens[starts[d] : starts[d] + lengths[d]] (int32; the others int64).

    Its first heads[d] tokens, bos and prompt, are nobody's target.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    heads: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row before it is filled: pieces of documents of a chunk (int64 arrays) and the number of its source."""

    chunk: Chunk
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    source: int


def build_batch(rows: Sequence[Row], row_length: int, padding_id: int) -> Batch:
    """Fill rows of `row_length` tokens; [B, T] int64 tensors on the CPU, B = len(rows), also for no rows at all."""
    shape = (len(rows), row_length)
    token_BT = np.full(shape, padding_id, np.int64)
    target_BT = np.full(shape, NOT_LEARNED, np.int64)
    document_BT = np.full(shape, PADDING_DOCUMENT, np.int64)
    position_BT = np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        _fill(row, token_BT[number], target_BT[number], document_BT[number], position_BT[number])
    return Batch(
        token_BT=torch.from_numpy(token_BT),
        target_BT=torch.from_numpy(target_BT),
        document_BT=torch.from_numpy(document_BT),
        position_BT=torch.from_numpy(position_BT),
        source_B=torch.tensor([row.source for row in rows], dtype=torch.int64),
    )


def _fill(row: Row, token_T: np.ndarray, target_T: np.ndarray, document_T: np.ndarray, position_T: np.ndarray) -> None:
    at = 0
    pieces = zip(row.documents.tolist(), row.starts.tolist(), row.lengths.tolist(), strict=True)
    for piece, (document, start, length) in enumerate(pieces):
        first = int(row.chunk.starts[document])
        document_end = first + int(row.chunk.lengths[document])
        here = slice(at, at + length)
        token_T[here] = row.chunk.tokens[first + start : first + start + length]
        following = row.chunk.tokens[first + start + 1 : min(first + start + length + 1, document_end)]
        given = min(max(int(row.chunk.heads[document]) - start - 1, 0), len(following))
        target_T[at + given : at + len(following)] = following[given:]
        document_T[here] = piece
        position_T[here] = np.arange(length)
        at += length
    position_T[at:] = np.arange(len(position_T) - at)
