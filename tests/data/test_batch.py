"""A batch says for each token its target, document and position, as worked out by hand and by a token-wise oracle."""

import numpy as np
import pytest
import torch

from data.batch import Chunk, Row, build_batch
from data.stream import Segment
from tests.data.corpus import PADDING, document_lengths, stream_of, unique_store


def row_of(chunk: Chunk, *pieces: tuple[int, int, int], source: int = 0) -> Row:
    documents, starts, lengths = np.array(pieces, np.int64).T
    return Row(chunk=chunk, documents=documents, starts=starts, lengths=lengths, source=source)


def test_an_example_by_hand() -> None:
    tokens = np.array([10, 11, 12, 13, 14, 20, 21], np.int32)
    chunk = Chunk(tokens=tokens, starts=np.array([5, 0]), lengths=np.array([2, 5]), heads=np.array([1, 1]))
    batch = build_batch([row_of(chunk, (1, 0, 4), source=3), row_of(chunk, (0, 0, 2), (1, 4, 1))], 4, 2)
    assert batch.token_BT.tolist() == [[10, 11, 12, 13], [20, 21, 14, 2]]
    assert batch.target_BT.tolist() == [[11, 12, 13, 14], [21, -1, -1, -1]]
    assert batch.document_BT.tolist() == [[0, 0, 0, 0], [0, 0, 1, -1]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.source_B.tolist() == [3, 0]


@pytest.mark.parametrize("head", range(8))
@pytest.mark.parametrize("row_length", [1, 2, 3, 7, 9])
def test_no_token_of_a_head_is_a_target_wherever_the_document_is_cut(head: int, row_length: int) -> None:
    tokens = np.arange(10, 17, dtype=np.int32)
    chunk = Chunk(tokens=tokens, starts=np.array([0]), lengths=np.array([7]), heads=np.array([head]))
    starts = range(0, 7, row_length)
    batch = build_batch([row_of(chunk, (0, at, min(row_length, 7 - at))) for at in starts], row_length, 2)
    expected = [token if token - 10 >= head else -1 for token in range(11, 17)] + [-1]
    assert batch.target_BT.flatten()[:7].tolist() == expected
    assert batch.token_BT.flatten()[:7].tolist() == tokens.tolist()


def test_padding_is_at_the_end_and_counts_from_zero() -> None:
    chunk = Chunk(tokens=np.arange(3, dtype=np.int32), starts=np.array([0]), lengths=np.array([3]), heads=np.array([1]))
    batch = build_batch([row_of(chunk, (0, 0, 3))], 7, 9)
    assert batch.token_BT.tolist() == [[0, 1, 2, 9, 9, 9, 9]]
    assert batch.target_BT.tolist() == [[1, 2, -1, -1, -1, -1, -1]]
    assert batch.document_BT.tolist() == [[0, 0, 0, -1, -1, -1, -1]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3]]


def test_no_rows_make_an_empty_batch() -> None:
    batch = build_batch([], 5, 0)
    assert batch.token_BT.shape == (0, 5)
    assert batch.source_B.shape == (0,)


def test_every_token_of_a_stream_agrees_with_the_store(tmp_path) -> None:
    lengths = document_lengths(40, 1, 90)
    store = unique_store(tmp_path / "store", lengths)
    ends = set((np.cumsum(lengths) - 1).tolist())
    starts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    batch = stream_of({"a": store}, [Segment(row_length=24, rows=60)]).rows(0, 0, 60)
    for field in (batch.token_BT, batch.target_BT, batch.document_BT, batch.position_BT, batch.source_B):
        assert field.dtype == torch.int64
    for token_T, target_T, document_T, position_T in zip(
        batch.token_BT.tolist(),
        batch.target_BT.tolist(),
        batch.document_BT.tolist(),
        batch.position_BT.tolist(),
        strict=True,
    ):
        for at, token in enumerate(token_T):
            assert (token == PADDING) == (document_T[at] == -1)
            learned = token != PADDING and token not in ends
            assert target_T[at] == (token + 1 if learned else -1)
            same_piece = at > 0 and token == token_T[at - 1] + 1 and token not in starts
            if at > 0 and token != PADDING:
                assert document_T[at] == document_T[at - 1] + (not same_piece)
                assert position_T[at] == (position_T[at - 1] + 1 if same_piece else 0)
