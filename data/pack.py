"""Documents of a chunk into rows of one length: best-fit decreasing, so that few documents are cut and few tokens pad.

Source: R 4.1 (documents packed to minimise truncation), by the method of Ding et al. 2024, "Fewer Truncations Improve
Language Modeling". A document longer than a row gives full rows and a remainder; a document that fits is never cut.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """The rows of one chunk: row r holds pieces row_starts[r] to row_starts[r + 1], all arrays int64.

    A piece is `lengths` tokens of document `documents` (its number in the chunk) from token `starts` on.
    """

    row_starts: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the chunk."""
        return len(self.row_starts) - 1


def pack(document_lengths: np.ndarray, row_length: int) -> Packing:
    """Pack documents of the given positive lengths (int64, tokens) into rows of `row_length` tokens.

    The longest piece goes first, into the fullest row that still takes it; equal lengths keep the document order.
    """
    documents, starts, lengths = _pieces(document_lengths, row_length)
    order = np.argsort(-lengths, kind="stable")
    rows = _best_fit(lengths[order].tolist(), row_length)
    by_row = np.argsort(rows, kind="stable")
    order = order[by_row]
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(rows))]) if len(rows) else np.zeros(1, np.int64)
    return Packing(
        row_starts=row_starts.astype(np.int64),
        documents=documents[order],
        starts=starts[order],
        lengths=lengths[order],
    )


def _pieces(document_lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = -(-document_lengths // row_length)
    documents = np.repeat(np.arange(len(document_lengths)), counts)
    first_pieces = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(documents)) - first_pieces) * row_length
    lengths = np.minimum(document_lengths[documents] - starts, row_length)
    return documents, starts, lengths


def _best_fit(lengths: list[int], row_length: int) -> np.ndarray:
    """Return the row of each piece, for pieces in falling order of length.

    Bit c of `free` says that some row has c tokens left: the smallest space that fits is one shift and one lowest
    bit, whatever the number of rows.
    """
    free = 0
    rows_by_space: dict[int, list[int]] = {}
    num_rows = 0
    rows = np.empty(len(lengths), np.int64)
    for piece, length in enumerate(lengths):
        fitting = free >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                free ^= 1 << space
        else:
            space, row = row_length, num_rows
            num_rows += 1
        rows[piece] = row
        left = space - length
        if left:
            rows_by_space.setdefault(left, []).append(row)
            free |= 1 << left
    return rows
