"""Ids give back every byte of every text, bytes per token are exact, and the same text trains the same vocabulary."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.tokenizer
from data.config import SourceConfig, TokenizerConfig
from data.source import read_documents
from data.split import Documents, Text, order_by_content
from data.tokenizer import Tokenizer, open_tokenizer, training_sample
from tests.data.corpus import data_config, documents_of, made_up_texts

ROOT = Path(__file__).parents[2]
SAMPLE = documents_of(made_up_texts(60, 5))
SPECIALS = "<|bos|> <|eos|><|pad|> <｜begin▁of▁sentence｜><｜end▁of▁sentence｜> <｜User｜> <think>"


def open_quietly(cache: Path, documents: Documents = SAMPLE, **settings: object) -> Tokenizer:
    tokenizer = TokenizerConfig(**({"kind": "bpe", "vocab_size": 350} | settings))
    config = data_config(cache, {"a": SourceConfig(kind="stdlib")}, tokenizer=tokenizer)
    return open_tokenizer(config, lambda: documents, lambda line: None)


def check_exact(tokenizer: Tokenizer, texts: list[str]) -> None:
    byte_counts = tokenizer.byte_counts()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert byte_counts[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_quietly(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_quietly(tmp_path_factory.mktemp("cache"), kind="deepseek")


@pytest.fixture(scope="module")
def library() -> list[str]:
    """The shorter files of the standard library, first those with letters beyond ASCII."""
    found = read_documents("a", SourceConfig(kind="stdlib"), lambda line: None)
    texts = [one.text for one in found.texts]
    short = [text for text in texts if len(text) < 40_000]
    beyond = [text for text in short if not text.isascii()]
    assert len(beyond) >= 10
    return beyond + [text for text in short if text.isascii()]


def test_bytes_are_exact_over_the_standard_library(bpe: Tokenizer, deepseek: Tokenizer, library: list[str]) -> None:
    check_exact(bpe, library[:200])
    check_exact(deepseek, library[:40])


@given(text=st.text(max_size=80))
def test_bytes_are_exact_for_any_text(bpe: Tokenizer, deepseek: Tokenizer, text: str) -> None:
    check_exact(bpe, [text])
    check_exact(deepseek, [text])


def test_special_tokens_have_deepseeks_places_and_no_bytes(bpe: Tokenizer, deepseek: Tokenizer) -> None:
    for tokenizer in (bpe, deepseek):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
        assert tokenizer.byte_counts()[:3].tolist() == [0, 0, 0]
        assert tokenizer.decode([0, *tokenizer.encode("text"), 1, 2]) == "text"
    assert bpe.vocab_size == 350
    assert deepseek.vocab_size == 129280


def test_a_text_cannot_write_special_tokens(bpe: Tokenizer, deepseek: Tokenizer) -> None:
    for tokenizer in (bpe, deepseek):
        check_exact(tokenizer, [SPECIALS])
        assert not set(tokenizer.encode(SPECIALS).tolist()) & {0, 1, 2}


def test_a_document_is_its_text_between_bos_and_eos(bpe: Tokenizer) -> None:
    texts = [Text("one two"), Text(""), Text("漢字"), Text("ha", "alp")]
    documents, heads = bpe.encode_documents(texts)
    for text, document in zip(texts, documents, strict=True):
        assert document.dtype == np.int32
        ids = [*bpe.encode(text.prompt).tolist(), *bpe.encode(text.text).tolist()]
        assert document.tolist() == [bpe.bos_id, *ids, bpe.eos_id]
    assert heads == [1, 1, 1, 1 + len(bpe.encode("alp"))]
    # A prompt and a text that would share a token together are encoded apart.
    assert len(bpe.encode("alp")) + len(bpe.encode("ha")) > len(bpe.encode("alpha"))


def test_half_a_letter_decodes_to_a_replacement(bpe: Tokenizer) -> None:
    assert bpe.decode(bpe.encode("\u0394")[:1]) == "\ufffd"


def test_a_trained_vocabulary_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_quietly(tmp_path)
    monkeypatch.setattr(data.tokenizer, "_train_bpe", lambda *args: pytest.fail("trained again"))
    assert open_quietly(tmp_path).fingerprint == first.fingerprint
    for change in ({"vocab_size": 351}, {"documents": order_by_content([*SAMPLE.texts, Text("more")])}):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            open_quietly(tmp_path, **change)


def test_another_process_with_other_threads_trains_the_same(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "texts.json").write_text(json.dumps([one.text for one in SAMPLE.texts]))
    program = (
        "import json, sys; from data.tokenizer import Tokenizer, _train_bpe;"
        "print(Tokenizer(_train_bpe(json.load(open(sys.argv[1])), 350), origin='').fingerprint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "texts.json")],
        env=os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == bpe.fingerprint


def test_two_at_once_leave_one_whole_file(tmp_path: Path, bpe: Tokenizer) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_quietly(tmp_path).fingerprint, range(8)))
    assert set(opened) == {bpe.fingerprint}
    assert len(list((tmp_path / "tokenizers").iterdir())) == 1


def test_a_file_is_read_as_it_is(tmp_path: Path, bpe: Tokenizer) -> None:
    cache = tmp_path / "cache"
    open_quietly(cache)
    [path] = (cache / "tokenizers").iterdir()
    loaded = open_quietly(tmp_path, kind="file", path=str(path))
    again = Tokenizer(loaded.json_text, origin="run")
    assert again.fingerprint == loaded.fingerprint == bpe.fingerprint
    assert loaded.encode(SPECIALS).tolist() == bpe.encode(SPECIALS).tolist()


def changed_json(tmp_path: Path, change) -> str:
    open_quietly(tmp_path / "cache")
    [path] = (tmp_path / "cache" / "tokenizers").iterdir()
    settings = json.loads(path.read_text())
    change(settings)
    target = tmp_path / "tokenizer.json"
    target.write_text(json.dumps(settings))
    return str(target)


def rename_eos(settings: dict) -> None:
    settings["added_tokens"][1]["content"] = "<|stop|>"
    settings["model"]["vocab"]["<|stop|>"] = settings["model"]["vocab"].pop("<|eos|>")


def test_a_vocabulary_that_loses_bytes_or_has_no_end_is_refused(tmp_path: Path) -> None:
    cases = [
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "expected a byte-level tokenizer.json"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "expected a byte-level tokenizer.json"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "expected a byte-level tokenizer.json"),
        (rename_eos, r"expected a tokenizer.json with one of the tokens <\|eos\|>"),
    ]
    for number, (change, message) in enumerate(cases):
        path = changed_json(tmp_path / str(number), change)
        with pytest.raises(ValueError, match=rf"data.tokenizer.path = {path}: {message}"):
            open_quietly(tmp_path, kind="file", path=path)


def test_without_bos_and_pad_the_end_token_serves(tmp_path: Path) -> None:
    def change(settings: dict) -> None:
        settings["added_tokens"] = [settings["added_tokens"][1]]
        settings["model"]["vocab"] = {
            token: number for token, number in settings["model"]["vocab"].items() if token not in ("<|bos|>", "<|pad|>")
        }

    loaded = open_quietly(tmp_path, kind="file", path=changed_json(tmp_path, change))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 1, 1)
    check_exact(loaded, ["text"])


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"version": "1.0"')
    for name in ("cut.json", "missing.json"):
        with pytest.raises(ValueError, match=rf"data.tokenizer.path = .*{name}: expected a tokenizer.json"):
            open_quietly(tmp_path, kind="file", path=str(tmp_path / name))


def test_a_sample_stays_within_its_bytes() -> None:
    sample = training_sample(SAMPLE, 5000)
    assert 0 < sample.num_bytes <= 5000
    assert SAMPLE.texts[: len(sample.texts)] == sample.texts
    assert training_sample(SAMPLE, 10**9) == SAMPLE
    assert len(training_sample(SAMPLE, 1).texts) == 1
