"""A stream read by chunks gives pure rows too, jumps by its notes, wraps at its end, and is refused when changed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig
from data.open import open_data
from data.source import StreamReader
from data.split import Text, content_hash
from data.stream import Segment, Stream
from tests.data.corpus import data_config, made_up_texts

TEXTS = made_up_texts(150, 8)
SEGMENTS = [Segment(row_length=64, rows=2000), Segment(row_length=128, rows=100)]
"""Chunks of 32 records make about 150 rows of 64 tokens, an epoch about 700."""


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write(tmp_path, TEXTS)
    source = SourceConfig(kind="stream", name="json", path=str(tmp_path / "a.json"), field="body")
    return data_config(tmp_path / "cache", {"live": source}, validation_fraction=0.2)


def write(folder: Path, texts: list[str]) -> None:
    (folder / "a.json").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))


def open_stream(config: DataConfig, split: str = "train") -> Stream:
    return getattr(open_data(config, SEGMENTS, 1, lambda line: None), split)


def rows(stream: Stream, segment: int, first: int, count: int) -> list[list[int]]:
    return stream.rows(segment, first, count).token_BT.tolist()


def test_any_order_and_fresh_objects_give_the_same_rows(config: DataConfig) -> None:
    stream = open_stream(config)
    expected = rows(stream, 0, 0, 500), rows(stream, 1, 0, 100)
    other = open_stream(config)
    assert (rows(other, 1, 40, 5), rows(other, 0, 450, 5)) == (expected[1][40:45], expected[0][450:455])
    assert rows(other, 0, 0, 5) == expected[0][:5]


def test_the_documents_are_those_of_the_stream_in_its_order_split_by_content(config: DataConfig) -> None:
    opened = open_data(config, SEGMENTS, 1, lambda line: None)
    trained = [opened.tokenizer.decode(ids) for ids in opened.train.documents()]
    held_out = [opened.tokenizer.decode(ids) for ids in opened.validation.documents()]
    assert sorted(trained + held_out) == sorted(TEXTS)
    assert [text for text in TEXTS if text in trained] == trained
    assert all(int.from_bytes(content_hash(Text(text))[-8:], "big") < 0.2 * 2**64 for text in held_out)
    assert held_out
    assert (opened.train.num_documents, opened.validation.num_tokens) == (None, None)


def test_an_epoch_wraps_and_has_a_new_order_of_rows(config: DataConfig) -> None:
    stream = open_stream(config)
    tokens = sum(len(document) for document in stream.documents())
    seen, count = 0, 0
    while seen < tokens:
        seen += int((stream.rows(0, count, 1).document_BT >= 0).sum())
        count += 1
    assert seen == tokens
    first, second = rows(stream, 0, 0, count), rows(stream, 0, count, count)
    assert sorted(first) == sorted(second)
    assert first != second


def test_validation_repeats_the_same_rows(config: DataConfig) -> None:
    stream = open_stream(config, "validation")
    tokens = sum(len(document) for document in stream.documents())
    batch = stream.rows(0, 0, 500)
    filled = (batch.document_BT >= 0).sum(1).cumsum(0).tolist()
    count = filled.index(tokens) + 1
    assert rows(stream, 0, count, count) == rows(stream, 0, 0, count)


def test_a_resumed_run_reads_only_what_it_needs(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(open_stream(config), 0, 500, 2)
    resumed = open_stream(config)
    asked: list[int] = []
    read = StreamReader.read

    def counted(self: StreamReader, first: int, count: int) -> list[Text]:
        asked.append(first)
        return read(self, first, count)

    monkeypatch.setattr(StreamReader, "read", counted)
    assert rows(resumed, 0, 500, 2) == expected
    assert asked
    assert 0 not in asked
    assert len(asked) == 1


def test_a_stream_that_changed_is_refused(config: DataConfig, tmp_path: Path) -> None:
    rows(open_stream(config), 0, 0, 500)
    write(tmp_path, [*TEXTS[:40], *reversed(TEXTS[40:])])
    changed = open_stream(config)
    with pytest.raises(ValueError, match=r"data.sources.live = chunk \d: expected the stream that .* has notes of"):
        rows(changed, 0, 0, 500)


@pytest.mark.parametrize("count", [31, 32, 33, 64])
def test_every_length_of_stream_ends_where_it_ends(config: DataConfig, tmp_path: Path, count: int) -> None:
    write(tmp_path, TEXTS[:count])
    documents = list(open_stream(config).documents()) + list(open_stream(config, "validation").documents())
    assert len(documents) == count


def test_a_stream_without_documents_on_one_side_is_refused(config: DataConfig, tmp_path: Path) -> None:
    held_out = [text for text in TEXTS if int.from_bytes(content_hash(Text(text))[-8:], "big") < 0.2 * 2**64]
    trained = [text for text in TEXTS if text not in held_out]
    for texts, missing in ((trained, "validation"), (held_out, "train")):
        write(tmp_path, texts)
        with pytest.raises(ValueError, match=rf"data.sources.live = no {missing} document: expected at least one"):
            open_stream(replace(config, cache_dir=str(tmp_path / missing)))


def test_an_empty_stream_is_refused(config: DataConfig, tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(ValueError, match=r"data.sources.live.path = .*: expected what `datasets` can stream"):
        open_stream(config)
