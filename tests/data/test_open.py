"""Opening the data finds, splits, trains and tokenises once; afterwards the same rows come from the cache alone."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

import data.open
import data.store
import data.tokenizer
from data.batch import Chunk
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.open import Data, open_data
from data.pack import pack
from data.stream import Segment
from tests.data.corpus import data_config, made_up_texts, write_texts

SEGMENTS = [Segment(row_length=64, rows=50), Segment(row_length=128, rows=20)]
DEEPSEEK = TokenizerConfig(kind="deepseek")
CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def text_config(tmp_path: Path, folder: str = "texts", seed: int = 1, **changes: object) -> DataConfig:
    path = tmp_path / folder
    if not path.exists():
        write_texts(path, made_up_texts(80, seed))
    return data_config(tmp_path / "cache", {"books": SourceConfig(kind="text", path=str(path))}, **changes)


def open_quietly(config: DataConfig, seed: int = 1, segments: list[Segment] = SEGMENTS) -> Data:
    return open_data(config, segments, seed, lambda line: None)


def first_rows(opened: Data, split: str = "train") -> torch.Tensor:
    return getattr(opened, split).rows(0, 0, 40).token_BT


def texts_of(opened: Data, split: str) -> list[str]:
    return [opened.tokenizer.decode(ids) for ids in getattr(opened, split).documents()]


def test_every_document_is_on_one_side_whole(tmp_path: Path) -> None:
    opened = open_quietly(text_config(tmp_path))
    trained, held_out = texts_of(opened, "train"), texts_of(opened, "validation")
    assert sorted(trained + held_out) == sorted(made_up_texts(80, 1))
    assert held_out
    for ids in opened.train.documents():
        assert (ids[0], ids[-1]) == (opened.tokenizer.bos_id, opened.tokenizer.eos_id)


def test_the_second_time_the_cache_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = text_config(tmp_path)
    cold = open_quietly(config)
    monkeypatch.setattr(data.tokenizer, "_train_bpe", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(data.store, "_tokenise", lambda *args: pytest.fail("tokenised again"))
    warm = open_quietly(config)
    assert torch.equal(first_rows(cold), first_rows(warm))
    assert warm.fingerprint == cold.fingerprint


def test_paths_and_the_cache_place_do_not_matter(tmp_path: Path) -> None:
    one = open_quietly(text_config(tmp_path))
    write_texts(tmp_path / "elsewhere" / "deeper", made_up_texts(80, 1)[::-1])
    two = open_quietly(text_config(tmp_path, "elsewhere", cache_dir=str(tmp_path / "other cache")))
    assert torch.equal(first_rows(one), first_rows(two))
    assert one.fingerprint == two.fingerprint


def test_another_corpus_or_tokenizer_has_another_fingerprint(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    deepseek = replace(config, tokenizer=DEEPSEEK)
    other = text_config(tmp_path, "more", seed=2)
    opened = [open_quietly(changed) for changed in (config, deepseek, other)]
    assert len({one.fingerprint for one in opened}) == 3
    assert sorted(texts_of(opened[1], "train")) == sorted(texts_of(opened[0], "train"))


def test_validation_rows_are_the_same_for_every_seed_and_training_rows_are_not(tmp_path: Path) -> None:
    one, two = (open_quietly(text_config(tmp_path), seed) for seed in (1, 2))
    assert torch.equal(first_rows(one, "validation"), first_rows(two, "validation"))
    assert not torch.equal(first_rows(one), first_rows(two))


def mixed_sources(folder: Path) -> dict[str, SourceConfig]:
    texts = {kind: [f"{kind} {text}" for text in made_up_texts(40, 3)] for kind in ("text", "jsonl", "parquet", "json")}
    write_texts(folder / "text", texts["text"])
    for kind in ("jsonl", "json"):
        (folder / f"a.{kind}").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts[kind]))
    parquet.write_table(pyarrow.table({"body": texts["parquet"]}), folder / "a.parquet")
    return {
        "texts": SourceConfig(kind="text", path=str(folder / "text")),
        "lines": SourceConfig(kind="jsonl", path=str(folder / "a.jsonl"), field="body", weight=2),
        "table": SourceConfig(kind="parquet", path=str(folder / "a.parquet"), field="body"),
        "live": SourceConfig(kind="stream", path=str(folder / "a.json"), name="json", field="body"),
    }


def test_every_kind_of_source_blends_in_any_order_of_the_configuration(tmp_path: Path) -> None:
    sources = mixed_sources(tmp_path)
    opened = open_quietly(data_config(tmp_path / "cache", sources))
    assert opened.train.source_names == ("lines", "live", "table", "texts")
    batch = opened.train.rows(0, 0, 50)
    assert torch.bincount(batch.source_B).tolist() == [20, 10, 10, 10]
    other = open_quietly(data_config(tmp_path / "cache", dict(reversed(sources.items()))))
    assert torch.equal(first_rows(opened), first_rows(other))
    for kind, source in zip(("jsonl", "json", "parquet", "text"), range(4), strict=True):
        row_T = batch.token_BT[batch.source_B == source]
        assert any(opened.tokenizer.decode(ids).startswith(kind) for ids in row_T.numpy())


def test_a_document_held_out_in_one_source_is_in_no_training_row_of_another(tmp_path: Path) -> None:
    texts = made_up_texts(60, 9)
    sources = {
        "one": SourceConfig(kind="text", path=str(write_texts(tmp_path / "one", texts[:40]))),
        "two": SourceConfig(kind="text", path=str(write_texts(tmp_path / "two", texts[20:]))),
    }
    opened = open_quietly(data_config(tmp_path / "cache", sources))
    assert not set(texts_of(opened, "train")) & set(texts_of(opened, "validation"))


def trained_on(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Data, tuple[str, ...]]:
    """Return the opened data and the texts its tokenizer was trained on."""
    seen: list[tuple[str, ...]] = []
    train = data.tokenizer._train_bpe

    def watched(texts: list[str], vocab_size: int) -> str:
        seen.append(tuple(texts))
        return train(texts, vocab_size)

    monkeypatch.setattr(data.tokenizer, "_train_bpe", watched)
    return open_quietly(config), seen[0]


def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_config(tmp_path / "cache", mixed_sources(tmp_path), chunk_documents=100)
    opened, texts = trained_on(config, monkeypatch)
    assert sorted(texts) == sorted(texts_of(opened, "train"))


def test_a_large_corpus_gives_the_tokenizer_a_sample_by_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.open, "TRAINING_BYTES", 25_000)
    opened, texts = trained_on(data_config(tmp_path / "cache", mixed_sources(tmp_path)), monkeypatch)
    sizes = {
        kind: sum(len(text.encode()) for text in texts if text.startswith(kind + " ")) for kind in ("jsonl", "text")
    }
    # a share is filled up to the next document, of at most 1,500 bytes
    assert 8500 < sizes["jsonl"] <= 10_000
    assert 3500 < sizes["text"] <= 5000
    assert set(texts) < set(texts_of(opened, "train"))


def prompted_sources(folder: Path, mark: str) -> dict[str, SourceConfig]:
    """The same texts in three formats; the prompts, and they alone, hold `mark`."""
    records = [{"ask": f"{mark * (i % 70)} ", "body": text} for i, text in enumerate(made_up_texts(80, 3))]
    for kind in ("jsonl", "json"):
        (folder / f"a.{kind}").write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet")
    kinds = {"jsonl": None, "parquet": None, "stream": "json"}
    return {
        kind: SourceConfig(
            kind=kind, path=str(folder / f"a.{name or kind}"), name=name, field="body", prompt_field="ask"
        )
        for kind, name in kinds.items()
    }


def test_prompts_are_in_the_rows_and_never_learned(tmp_path: Path) -> None:
    """In rows that cut them and rows that do not, from fresh tokens and from the cache, of every kind of record."""
    sources = prompted_sources(tmp_path, "§")
    for kind, source in sources.items():
        config = data_config(tmp_path / "cache", {kind: source})
        segments = [Segment(row_length=64, rows=2000), Segment(row_length=128, rows=20)]
        cold, warm = (open_quietly(config, segments=segments) for _ in range(2))
        for segment in (0, 1):
            batch, again = (opened.train.rows(segment, 0, 20) for opened in (cold, warm))
            assert torch.equal(batch.target_BT, again.target_BT)
            assert "§" in cold.tokenizer.decode(batch.token_BT.flatten().numpy())
            learned = cold.tokenizer.decode(batch.target_BT[batch.target_BT >= 0].numpy())
            assert len(learned) > 1000
            assert "§" not in learned
        heads = sum(head for chunk in chunks(cold) for head in chunk.heads.tolist())
        assert learned_in_an_epoch(cold) == sum(map(len, cold.train.documents())) - heads


def chunks(opened: Data) -> list[Chunk]:
    """All chunks of one epoch of the only training source."""
    [source] = opened.train._sources
    positions = itertools.takewhile(lambda position: source.locate(position)[0] == 0, itertools.count())
    return [source.load(*source.locate(position)) for position in positions]


def learned_in_an_epoch(opened: Data) -> int:
    packed = [pack(chunk.lengths, 64) for chunk in chunks(opened)]
    rows = sum(packing.num_rows for packing in packed)
    return int((opened.train.rows(0, 0, rows).target_BT >= 0).sum())


def test_another_prompt_is_another_document(tmp_path: Path) -> None:
    opened = []
    for mark in ("§", "¶"):
        source = prompted_sources(tmp_path, mark)["jsonl"]
        opened.append(open_quietly(data_config(tmp_path / "cache", {"a": source}, tokenizer=DEEPSEEK)))
    assert opened[0].fingerprint != opened[1].fingerprint
    assert not torch.equal(first_rows(opened[0]), first_rows(opened[1]))


def test_progress_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    open_data(text_config(tmp_path), SEGMENTS, 1, lines.append)
    assert lines[0] == "data: books: 80 documents, 0.1 MB"
    assert lines[1].startswith("tokenizer: training 300 entries on 0.1 MB")
    assert [line.split(":")[0] for line in lines] == ["data", "tokenizer", "tokenizer", "tokens", "tokens"]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.cache_dir = .*file: expected a folder that can be written"):
        open_quietly(text_config(tmp_path, cache_dir=str(tmp_path / "file")))


def templates() -> Iterator[tuple[str, dict]]:
    for path in sorted(CONFIGS.glob("*.yaml")):
        yield path.stem, yaml.safe_load(path.read_text())


def test_the_templates_are_the_five_kinds_and_name_every_key() -> None:
    found = dict(templates())
    assert sorted(found) == ["jsonl", "parquet", "stdlib", "stream", "text"]
    for kind, settings in found.items():
        [source] = settings["sources"].values()
        assert source.pop("path", None) == (None if kind == "stdlib" else "???")
        config = DataConfig(
            sources={kind: SourceConfig(**source, path="some/where")},
            tokenizer=TokenizerConfig(**settings["tokenizer"]),
            **{key: value for key, value in settings.items() if key not in ("sources", "tokenizer")},
        )
        assert config.sources[kind].kind == kind
        assert config.tokenizer == TokenizerConfig(kind="bpe", vocab_size=1024)
        assert set(settings) == set(DataConfig.__slots__)
