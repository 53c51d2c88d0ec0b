"""The split depends on content alone, holds out the share asked for, and never trains on what it holds out."""

import hashlib
from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig
from data.split import Text, content_hash, make_split, order_by_content, select
from tests.data.corpus import data_config, documents_of, made_up_texts


def config(tmp_path: Path, fraction: float) -> DataConfig:
    return data_config(tmp_path, {"a": SourceConfig(kind="stdlib")}, validation_fraction=fraction)


def test_order_and_duplicates_do_not_matter() -> None:
    texts = made_up_texts(50, 1)
    assert documents_of([*texts, *texts[:7], "", ""]) == documents_of(reversed(texts))
    assert sorted(one.text for one in documents_of(texts).texts) == sorted(texts)


def test_the_share_held_out_is_the_one_asked_for(tmp_path: Path) -> None:
    documents = documents_of(f"document {i}" for i in range(20_000))
    held_out = select(documents, make_split({"a": documents}, config(tmp_path, 0.03)), held_out=True)
    # 600 expected, deviation sqrt(600 * 0.97) = 24; five deviations
    assert abs(len(held_out.texts) - 600) < 120


def test_the_order_says_nothing_about_the_split(tmp_path: Path) -> None:
    documents = documents_of(f"document {i}" for i in range(2000))
    split = make_split({"a": documents}, config(tmp_path, 0.1))
    places = [i for i, content in enumerate(documents.hashes) if split.holds_out(content)]
    # 200 places uniform in 0..2000: their mean deviates by 2000 / sqrt(12 * 200) = 41; five deviations
    assert abs(sum(places) / len(places) - 1000) < 205


def test_a_document_stays_on_its_side_when_the_corpus_grows(tmp_path: Path) -> None:
    small = documents_of(made_up_texts(100, 1))
    large = documents_of([*made_up_texts(300, 2), *made_up_texts(100, 1)])
    before, after = (make_split({"a": documents}, config(tmp_path, 0.1)) for documents in (small, large))
    assert [before.holds_out(content) for content in small.hashes] == [after.holds_out(c) for c in small.hashes]


def test_a_small_source_holds_out_one_document_and_no_other_source_trains_on_it(tmp_path: Path) -> None:
    texts = [f"few {i}" for i in range(5)]
    sources = {"few": documents_of(texts), "many": documents_of([*texts, *made_up_texts(200, 1)])}
    split = make_split(sources, config(tmp_path, 1e-6))
    held_out = {name: set(select(found, split, held_out=True).texts) for name, found in sources.items()}
    trained = {name: set(select(found, split, held_out=False).texts) for name, found in sources.items()}
    assert len(held_out["few"]) == 1
    assert held_out["few"] <= held_out["many"]
    assert not (held_out["few"] | held_out["many"]) & (trained["few"] | trained["many"])
    assert all(held_out[name] | trained[name] == set(sources[name].texts) for name in sources)


@pytest.mark.parametrize("texts", [[], ["", ""], ["one"], ["one", "one"]])
def test_fewer_than_two_documents_are_refused(tmp_path: Path, texts: list[str]) -> None:
    found = len(set(texts) - {""})
    with pytest.raises(ValueError, match=rf"data.sources.a = {found} documents: expected at least 2 different"):
        make_split({"a": documents_of(texts)}, config(tmp_path, 0.1))


def test_the_hash_is_that_of_the_bytes() -> None:
    assert content_hash(Text("é")) == content_hash(Text("\u00e9")) != content_hash(Text("e\u0301"))
    assert content_hash(Text("a")) == hashlib.sha256(b"a").digest()


def test_a_document_is_its_prompt_and_its_text() -> None:
    """Nothing moves from one to the other unseen, and a prompt without a text is no document."""
    texts = [Text("b", "a"), Text("b"), Text("ab"), Text("a", "b"), Text("b", "c")]
    found = order_by_content([*texts, *texts, Text("", "alone")])
    assert sorted(found.texts) == sorted(texts)
    assert found.num_bytes == 2 + 1 + 2 + 2 + 2
