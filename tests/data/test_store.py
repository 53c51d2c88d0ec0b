"""The token store holds each document's ids, is written once and whole, and is not trusted when it is cut short."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import data.store
from data.cache import write_folder_once
from data.config import DataConfig, SourceConfig
from data.split import Documents, Text, order_by_content
from data.store import HEADS, OFFSETS, TOKENS, TokenStore, open_store
from data.tokenizer import Tokenizer, open_tokenizer
from tests.data.corpus import data_config, documents_of, made_up_texts

DOCUMENTS = documents_of(made_up_texts(40, 6))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(config(tmp_path_factory.mktemp("cache")), lambda: DOCUMENTS, lambda line: None)


def config(cache: Path) -> DataConfig:
    return data_config(cache, {"a": SourceConfig(kind="stdlib")})


def open_quietly(cache: Path, tokenizer: Tokenizer, documents: Documents = DOCUMENTS) -> TokenStore:
    return open_store("a train", documents, tokenizer, config(cache), lambda line: None)


def test_each_document_has_its_ids(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.store, "BATCH_BYTES", 1000)
    store = open_quietly(tmp_path, tokenizer)
    expected, heads = tokenizer.encode_documents(DOCUMENTS.texts)
    assert [ids.tolist() for ids in store.documents()] == [ids.tolist() for ids in expected]
    assert store.heads.tolist() == heads == [1] * len(expected)
    assert store.num_documents == len(expected)
    assert store.num_tokens == sum(map(len, expected))
    assert store.tokens.dtype == np.int32
    assert store.offsets.dtype == np.int64


def test_the_second_time_nothing_is_tokenised(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_quietly(tmp_path, tokenizer)
    monkeypatch.setattr(data.store, "_tokenise", lambda *args: pytest.fail("tokenised again"))
    assert np.array_equal(open_quietly(tmp_path, tokenizer).tokens, first.tokens)
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        open_quietly(tmp_path, tokenizer, order_by_content(DOCUMENTS.texts[1:]))


def test_prompts_are_kept_apart_in_the_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompted = order_by_content([*DOCUMENTS.texts, Text("learned", "given "), Text("given learned")])
    for _ in range(2):
        store = open_quietly(tmp_path, tokenizer, prompted)
        for text, ids, head in zip(prompted.texts, store.documents(), store.heads.tolist(), strict=True):
            assert tokenizer.decode(ids[:head]) == text.prompt
            assert tokenizer.decode(ids[head:]) == text.text
    assert sorted(set(store.heads.tolist())) == [1, 1 + len(tokenizer.encode("given "))]


def test_another_tokenizer_has_another_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    more = documents_of(made_up_texts(50, 7))
    other = open_tokenizer(config(tmp_path), lambda: more, lambda line: None)
    assert other.fingerprint != tokenizer.fingerprint
    for chosen in (tokenizer, other):
        store = open_quietly(tmp_path, chosen)
        assert next(store.documents()).tolist() == chosen.encode_documents(DOCUMENTS.texts[:1])[0][0].tolist()


def test_several_at_once_leave_one_whole_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_quietly(tmp_path, tokenizer), range(8)))
    assert all(np.array_equal(store.tokens, stores[0].tokens) for store in stores)
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_a_writer_that_dies_leaves_no_store(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(handle: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", die)
        with pytest.raises(KeyboardInterrupt):
            open_quietly(tmp_path, tokenizer)
    assert list((tmp_path / "tokens").iterdir()) == []
    assert open_quietly(tmp_path, tokenizer).num_documents == len(DOCUMENTS.texts)


@pytest.mark.parametrize("name", [TOKENS, OFFSETS, HEADS])
def test_a_store_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "store"
    arrays = {TOKENS: np.arange(9, dtype="<i4"), OFFSETS: np.array([0, 4, 9], "<i8"), HEADS: np.ones(2, "<i8")}
    write_folder_once(folder, arrays)
    assert TokenStore(folder).num_tokens == 9
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"data.cache_dir = .*store: expected whole token files"):
        TokenStore(folder)


def test_progress_is_reported(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.store, "BATCH_BYTES", 1000)
    monkeypatch.setattr(data.store, "REPORT_EVERY_S", 0.0)
    lines: list[str] = []
    open_store("a train", DOCUMENTS, tokenizer, config(tmp_path), lines.append)
    assert len(lines) > 2
    assert all(line.startswith("tokens: a train: ") for line in lines)
    assert lines[-1].startswith(f"tokens: a train: {len(DOCUMENTS.texts)} documents, ")
