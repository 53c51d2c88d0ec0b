"""Small corpora for the data tests: token stores whose every token is unique, and folders of made-up text."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.cache import write_folder_once
from data.chunks import StoredChunks
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.split import Documents, Text, order_by_content
from data.store import HEADS, OFFSETS, TOKENS, TokenStore
from data.stream import Segment, Stream

PADDING = -7
"""No token of a unique store is negative."""
WORDS = ["alpha", "beta", "gamma", "delta", "theta", "straße", "naïve", "漢字", "😀", "\n", "\t", "return", "if"]


def document_lengths(count: int, seed: int, longest: int) -> list[int]:
    """Return skewed lengths, 1 to `longest` tokens."""
    random = np.random.default_rng(seed)
    return np.clip(random.lognormal(np.log(longest / 12), 1.2, count), 1, longest).astype(int).tolist()


def unique_store(folder: Path, lengths: Sequence[int], first_token: int = 0) -> TokenStore:
    """Return a store in which token i of all tokens is first_token + i: every token tells where it comes from."""
    offsets = np.cumsum([0, *lengths]).astype("<i8")
    tokens = np.arange(first_token, first_token + offsets[-1]).astype("<i4")
    heads = np.ones(len(lengths), "<i8")
    write_folder_once(folder, {TOKENS: tokens, OFFSETS: offsets, HEADS: heads})
    return TokenStore(folder)


def stream_of(
    stores: dict[str, TokenStore],
    segments: Sequence[Segment],
    *,
    weights: Sequence[int] | None = None,
    chunk_documents: int = 16,
    seed: int = 1,
    split: str = "train",
) -> Stream:
    """Return a fresh stream over stores, with no state shared with any other."""
    sources = [StoredChunks(name, store, chunk_documents=chunk_documents, seed=seed) for name, store in stores.items()]
    return Stream(
        sources=sources,
        weights=weights or [1] * len(sources),
        segments=segments,
        seed=seed,
        split=split,
        padding_id=PADDING,
    )


def made_up_texts(count: int, seed: int) -> list[str]:
    """Return different texts of a few hundred words, with letters of one to four bytes."""
    random = np.random.default_rng(seed)
    sizes = random.integers(5, 300, count)
    return [f"{i} " + " ".join(random.choice(WORDS, size)) for i, size in enumerate(sizes)]


def documents_of(texts: Iterable[str]) -> Documents:
    """Return texts as the documents of a source, without prompts."""
    return order_by_content(map(Text, texts))


def write_texts(folder: Path, texts: Sequence[str]) -> Path:
    """Write one file per text and return the folder."""
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return folder


def data_config(cache: Path, sources: dict[str, SourceConfig], **changes: object) -> DataConfig:
    """Return a configuration with a small trained BPE and small chunks."""
    settings = {
        "tokenizer": TokenizerConfig(kind="bpe", vocab_size=300),
        "cache_dir": str(cache),
        "chunk_documents": 32,
        "validation_fraction": 0.1,
    }
    return DataConfig(sources=sources, **(settings | changes))
