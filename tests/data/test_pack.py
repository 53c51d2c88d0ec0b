"""Packing loses and repeats no token, cuts no document that fits, equals a naive best-fit, and fills the rows."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.pack import Packing, pack
from tests.data.corpus import document_lengths

LENGTHS = st.lists(st.integers(1, 70), max_size=60)


def naive_row_sizes(lengths: list[int], row_length: int) -> list[int]:
    """Return the tokens in each row of best-fit decreasing, found by trying every row."""
    pieces = [row_length] * sum(length // row_length for length in lengths)
    pieces += [length % row_length for length in lengths if length % row_length]
    spaces: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [space for space in spaces if space >= piece]
        if fitting:
            spaces[spaces.index(min(fitting))] -= piece
        else:
            spaces.append(row_length - piece)
    return sorted(row_length - space for space in spaces)


def pieces_of(packing: Packing) -> list[tuple[int, int, int]]:
    return list(zip(packing.documents.tolist(), packing.starts.tolist(), packing.lengths.tolist(), strict=True))


def sizes_of(packing: Packing) -> list[int]:
    return [int(packing.lengths[a:b].sum()) for a, b in pairwise(packing.row_starts)]


@given(lengths=LENGTHS, row_length=st.integers(1, 40))
def test_every_token_lies_in_one_piece(lengths: list[int], row_length: int) -> None:
    packing = pack(np.array(lengths, np.int64), row_length)
    tokens = [(d, t) for d, start, length in pieces_of(packing) for t in range(start, start + length)]
    assert sorted(tokens) == [(d, t) for d, length in enumerate(lengths) for t in range(length)]


@given(lengths=LENGTHS, row_length=st.integers(1, 40))
def test_rows_hold_what_fits_and_only_long_documents_are_cut(lengths: list[int], row_length: int) -> None:
    packing = pack(np.array(lengths, np.int64), row_length)
    assert all(0 < size <= row_length for size in sizes_of(packing))
    for document, start, length in pieces_of(packing):
        assert start % row_length == 0
        assert length == min(row_length, lengths[document] - start)


@given(lengths=LENGTHS, row_length=st.integers(1, 40))
def test_rows_are_as_full_as_those_of_the_naive_best_fit(lengths: list[int], row_length: int) -> None:
    packing = pack(np.array(lengths, np.int64), row_length)
    assert sorted(sizes_of(packing)) == naive_row_sizes(lengths, row_length)


@given(lengths=LENGTHS, row_length=st.integers(2, 40))
def test_no_row_could_take_a_later_one_whole(lengths: list[int], row_length: int) -> None:
    packing = pack(np.array(lengths, np.int64), row_length)
    first_pieces = packing.lengths[packing.row_starts[:-1]].tolist()
    for row, size in enumerate(sizes_of(packing)):
        assert all(size + opening > row_length for opening in first_pieces[row + 1 :])


@pytest.mark.parametrize("row_length", [512, 4096])
def test_a_chunk_of_ten_thousand_documents_fills_its_rows(row_length: int) -> None:
    lengths = np.array(document_lengths(10_000, 3, 20_000))
    packing = pack(lengths, row_length)
    # measured 0.9999 and 0.9998; 64 documents at a time would give 0.95
    assert lengths.sum() / (packing.num_rows * row_length) > 0.999


def test_an_example_by_hand() -> None:
    packing = pack(np.array([3, 25, 4, 6]), 10)
    rows = [pieces_of(packing)[a:b] for a, b in pairwise(packing.row_starts)]
    assert rows == [[(1, 0, 10)], [(1, 10, 10)], [(3, 0, 6), (2, 0, 4)], [(1, 20, 5), (0, 0, 3)]]
