"""Rows are a pure function of their number: any order, fresh object or jump; nothing seen twice within an epoch."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.chunks import StoredChunks
from data.pack import pack
from data.store import TokenStore
from data.stream import Segment, Stream
from tests.data.corpus import PADDING, document_lengths, stream_of, unique_store

LENGTHS = document_lengths(100, 2, 150)
LONG = [Segment(row_length=32, rows=400)]
"""100 documents in 7 chunks of at most 16 make about 60 rows of 32 tokens per epoch."""


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, TokenStore]:
    return {
        "a": unique_store(tmp_path / "a", LENGTHS),
        "b": unique_store(tmp_path / "b", document_lengths(31, 3, 90), first_token=1_000_000),
    }


def as_bytes(batch: Batch) -> bytes:
    fields = (batch.token_BT, batch.target_BT, batch.document_BT, batch.position_BT, batch.source_B)
    return b"".join(field.numpy().tobytes() for field in fields)


def tokens_of(batch: Batch, source: int = 0) -> list[int]:
    token_BT = batch.token_BT[batch.source_B == source]
    return token_BT[token_BT != PADDING].tolist()


def epoch_rows(stream: Stream, segment: int, total_tokens: int) -> int:
    """Return how many first rows hold exactly one epoch of a stream of one source."""
    row, seen = 0, 0
    while seen < total_tokens:
        seen += len(tokens_of(stream.rows(segment, row, 1)))
        row += 1
    return row


def test_any_order_of_calls_and_any_object_gives_the_same_rows(stores: dict[str, TokenStore]) -> None:
    segments = [Segment(row_length=32, rows=150), Segment(row_length=48, rows=150)]
    reference = stream_of(stores, segments, weights=[3, 2])
    expected = {(s, row): as_bytes(reference.rows(s, row, 1)) for s in (0, 1) for row in range(150)}
    backwards = stream_of(stores, segments, weights=[3, 2])
    for segment, row in reversed(expected):
        assert as_bytes(backwards.rows(segment, row, 1)) == expected[segment, row]
    for segment, row in [(1, 149), (0, 149), (1, 0), (0, 77)]:
        assert as_bytes(stream_of(stores, segments, weights=[3, 2]).rows(segment, row, 1)) == expected[segment, row]


def test_the_origin_of_a_row_leads_to_its_tokens(stores: dict[str, TokenStore]) -> None:
    stream = stream_of(stores, [Segment(row_length=32, rows=150)], weights=[3, 2])
    for number in (0, 1, 77, 149):
        batch, origin = stream.rows(0, number, 1), stream.origin(0, number)
        chunks = stream._sources[int(batch.source_B[0])]
        chunk = chunks.load(origin.epoch, origin.chunk)
        at = 0
        for document, start, length in zip(origin.documents, origin.starts, origin.lengths, strict=True):
            first = chunk.starts[document] + start
            assert batch.token_BT[0, at : at + length].tolist() == chunk.tokens[first : first + length].tolist()
            at += length
        assert at == len(tokens_of(batch, int(batch.source_B[0])))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_any_split_of_a_batch_gives_the_same_rows(stores: dict[str, TokenStore], ranks: int) -> None:
    whole = stream_of(stores, LONG).rows(0, 24, 24)
    share = 24 // ranks
    parts = [stream_of(stores, LONG).rows(0, 24 + rank * share, share) for rank in range(ranks)]
    for field in ("token_BT", "target_BT", "document_BT", "position_BT", "source_B"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))


def test_an_epoch_holds_every_token_once_and_the_next_has_another_order(stores: dict[str, TokenStore]) -> None:
    only = {"a": stores["a"]}
    stream = stream_of(only, LONG)
    rows = epoch_rows(stream, 0, sum(LENGTHS))
    first, second = stream.rows(0, 0, rows), stream.rows(0, rows, rows)
    assert sorted(tokens_of(first)) == list(range(sum(LENGTHS)))
    assert tokens_of(first) != sorted(tokens_of(first))
    assert tokens_of(first) != tokens_of(second)
    # chunks of another epoch hold other documents, so their rows differ in number by a few
    third = stream.rows(0, 0, epoch_rows(stream_of(only, LONG), 0, 2 * sum(LENGTHS)))
    assert Counter(tokens_of(third)) == dict.fromkeys(range(sum(LENGTHS)), 2)


def test_every_epoch_deals_the_documents_to_chunks_anew(stores: dict[str, TokenStore]) -> None:
    chunks = StoredChunks("a", stores["a"], chunk_documents=16, seed=1)
    sizes = [len(chunks.lengths(0, number)) for number in range(7)]
    assert sizes == [14, 14, 14, 15, 14, 14, 15]
    members = [frozenset(chunks.load(epoch, 0).starts.tolist()) for epoch in range(4)]
    assert len(set(members)) == 4
    assert chunks.locate(7 * 3 + 2) == (3, 2)


def test_a_corpus_smaller_than_a_chunk_is_one_chunk_per_epoch(stores: dict[str, TokenStore]) -> None:
    stream = stream_of({"a": stores["a"]}, LONG, chunk_documents=10_000)
    rows = epoch_rows(stream, 0, sum(LENGTHS))
    for epoch in range(3):
        assert sorted(tokens_of(stream.rows(0, epoch * rows, rows))) == list(range(sum(LENGTHS)))
    orders = {as_bytes(stream.rows(0, epoch * rows, rows)) for epoch in range(3)}
    assert len(orders) == 3


def test_a_later_segment_takes_the_chunks_that_no_earlier_one_touched(stores: dict[str, TokenStore]) -> None:
    segments = [Segment(row_length=32, rows=9), Segment(row_length=24, rows=5), Segment(row_length=100, rows=4)]
    stream = stream_of({"a": stores["a"]}, segments)
    seen = [tokens_of(stream.rows(s, 0, segment.rows)) for s, segment in enumerate(segments)]
    every = [token for tokens in seen for token in tokens]
    assert len(every) == len(set(every)) < sum(LENGTHS)
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    documents = [set(owner[tokens].tolist()) for tokens in seen]
    assert not documents[0] & documents[1] | documents[0] & documents[2] | documents[1] & documents[2]


@pytest.mark.parametrize(("extra_rows", "chunks_used"), [(-1, 1), (0, 1), (1, 2)])
def test_a_later_segment_skips_no_chunk(stores: dict[str, TokenStore], extra_rows: int, chunks_used: int) -> None:
    chunks = StoredChunks("a", stores["a"], chunk_documents=16, seed=1)
    rows_of_first_chunk = pack(chunks.lengths(0, 0), 32).num_rows
    segments = [Segment(row_length=32, rows=rows_of_first_chunk + extra_rows), Segment(row_length=24, rows=400)]
    stream = stream_of({"a": stores["a"]}, segments)
    used = sum(int(chunks.lengths(0, number).sum()) for number in range(chunks_used))
    rows = epoch_rows(stream, 1, sum(LENGTHS) - used)
    left = set(tokens_of(stream.rows(1, 0, rows)))
    assert len(left) == sum(LENGTHS) - used
    assert not left & set(tokens_of(stream.rows(0, 0, rows_of_first_chunk - 1)))


def test_a_segment_without_rows_changes_nothing(stores: dict[str, TokenStore]) -> None:
    last = Segment(row_length=40, rows=20)
    plain = stream_of(stores, [Segment(row_length=32, rows=9), last])
    longer = stream_of(stores, [Segment(row_length=32, rows=9), Segment(row_length=64, rows=0), last])
    assert as_bytes(plain.rows(1, 0, 20)) == as_bytes(longer.rows(2, 0, 20))


def test_sources_come_in_their_shares_and_know_their_number(stores: dict[str, TokenStore]) -> None:
    batch = stream_of(stores, LONG, weights=[3, 1]).rows(0, 0, 400)
    assert torch.bincount(batch.source_B).tolist() == [300, 100]
    first_token_B = batch.token_BT[:, 0]
    assert torch.equal(first_token_B >= 1_000_000, batch.source_B == 1)


def test_another_source_does_not_change_the_rows_of_this_one(stores: dict[str, TokenStore]) -> None:
    alone = stream_of({"a": stores["a"]}, LONG).rows(0, 0, 50)
    mixed = stream_of(stores, LONG).rows(0, 0, 100)
    assert torch.equal(mixed.token_BT[mixed.source_B == 0], alone.token_BT)


def test_the_seed_changes_the_order(stores: dict[str, TokenStore]) -> None:
    one, two = (stream_of(stores, LONG, seed=seed).rows(0, 0, 60) for seed in (1, 2))
    assert as_bytes(one) != as_bytes(two)


def test_validation_starts_every_segment_at_the_same_rows_and_repeats_them(stores: dict[str, TokenStore]) -> None:
    segments = [Segment(row_length=32, rows=3), Segment(row_length=32, rows=3)]
    stream = stream_of({"a": stores["a"]}, segments, split="validation")
    rows = epoch_rows(stream, 0, sum(LENGTHS))
    assert rows > 3
    once = stream.rows(0, 0, rows)
    assert sorted(tokens_of(once)) == list(range(sum(LENGTHS)))
    assert as_bytes(stream.rows(1, 0, rows)) == as_bytes(once)
    assert as_bytes(stream.rows(0, rows, rows)) == as_bytes(once)


def test_all_documents_can_be_walked(stores: dict[str, TokenStore]) -> None:
    stream = stream_of(stores, LONG)
    documents = list(stream.documents())
    assert len(documents) == stream.num_documents == 131
    assert sum(map(len, documents)) == stream.num_tokens
    assert np.concatenate(documents[:100]).tolist() == list(range(sum(LENGTHS)))
    assert stream.source_names == ("a", "b")


def test_training_rows_outside_the_segment_are_a_mistake(stores: dict[str, TokenStore]) -> None:
    with pytest.raises(AssertionError):
        stream_of(stores, LONG).rows(0, 399, 2)


def test_rows_fill_well(stores: dict[str, TokenStore]) -> None:
    stream = stream_of({"a": stores["a"]}, LONG, chunk_documents=100)
    rows = epoch_rows(stream, 0, sum(LENGTHS))
    # about 60 rows, of which the last ones have no document left to fill them
    assert sum(LENGTHS) / (rows * 32) > 0.97


def test_the_order_is_frozen(tmp_path: Path) -> None:
    stores = {
        "a": unique_store(tmp_path / "a", [i * 37 % 150 + 1 for i in range(100)]),
        "b": unique_store(tmp_path / "b", [i * 29 % 90 + 1 for i in range(31)], first_token=1_000_000),
    }
    segments = [Segment(row_length=32, rows=40), Segment(row_length=64, rows=20)]
    stream = stream_of(stores, segments, weights=[3, 2], seed=7)
    found = [hashlib.sha256(as_bytes(stream.rows(s, 0, segments[s].rows))).hexdigest()[:16] for s in (0, 1)]
    assert found == ["6e669340d28fce96", "6e3810c309430c0c"]
