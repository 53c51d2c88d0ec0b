"""The split depends on content alone, holds out the share asked for, and never trains on what it holds out."""

from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig
from data.split import content_hash, make_split, order_by_content, select
from tests.data.corpus import data_config, made_up_texts


def config(tmp_path: Path, fraction: float) -> DataConfig:
    return data_config(tmp_path, {"a": SourceConfig(kind="stdlib")}, validation_fraction=fraction)


def test_order_and_duplicates_do_not_matter() -> None:
    texts = made_up_texts(50, 1)
    assert order_by_content([*texts, *texts[:7], "", ""]) == order_by_content(reversed(texts))
    assert sorted(order_by_content(texts).texts) == sorted(texts)


def test_the_share_held_out_is_the_one_asked_for(tmp_path: Path) -> None:
    documents = order_by_content(f"document {i}" for i in range(20_000))
    held_out = select(documents, make_split({"a": documents}, config(tmp_path, 0.03)), held_out=True)
    # 600 expected, deviation sqrt(600 * 0.97) = 24; five deviations
    assert abs(len(held_out.texts) - 600) < 120


def test_the_order_says_nothing_about_the_split(tmp_path: Path) -> None:
    documents = order_by_content(f"document {i}" for i in range(2000))
    split = make_split({"a": documents}, config(tmp_path, 0.1))
    places = [i for i, content in enumerate(documents.hashes) if split.holds_out(content)]
    # 200 places uniform in 0..2000: their mean deviates by 2000 / sqrt(12 * 200) = 41; five deviations
    assert abs(sum(places) / len(places) - 1000) < 205


def test_a_document_stays_on_its_side_when_the_corpus_grows(tmp_path: Path) -> None:
    small = order_by_content(made_up_texts(100, 1))
    large = order_by_content([*small.texts, *made_up_texts(300, 2)])
    before, after = (make_split({"a": documents}, config(tmp_path, 0.1)) for documents in (small, large))
    assert [before.holds_out(content) for content in small.hashes] == [after.holds_out(c) for c in small.hashes]


def test_a_small_source_holds_out_one_document_and_no_other_source_trains_on_it(tmp_path: Path) -> None:
    texts = [f"few {i}" for i in range(5)]
    sources = {"few": order_by_content(texts), "many": order_by_content([*texts, *made_up_texts(200, 1)])}
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
        make_split({"a": order_by_content(texts)}, config(tmp_path, 0.1))


def test_the_hash_is_that_of_the_bytes() -> None:
    assert content_hash("é") == content_hash("\u00e9") != content_hash("e\u0301")
