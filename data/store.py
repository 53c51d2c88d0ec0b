"""Tokenised documents on disk: one flat int32 file, the offsets of its documents, and how long their heads are."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.cache import cache_folder, write_folder_once
from data.config import DataConfig, Report
from data.split import Documents, Text, hash_of_hashes, num_bytes
from data.tokenizer import DOCUMENT_LAYOUT, Tokenizer

TOKENS, OFFSETS, HEADS = "tokens.int32", "offsets.int64", "heads.int64"
BATCH_BYTES = 2**21
"""Text that is tokenised at once: enough for all threads, small enough for progress and memory."""
REPORT_EVERY_S = 5.0


class TokenStore:
    """The documents of one source and split; document d is tokens[offsets[d] : offsets[d + 1]].

    Its first heads[d] tokens are read and not learned. The tokens are mapped into memory.
    """

    def __init__(self, folder: Path) -> None:
        """Map a folder that `open_store` wrote; raises ValueError when a file is cut short."""
        self.offsets = np.fromfile(folder / OFFSETS, "<i8")
        self.heads = np.fromfile(folder / HEADS, "<i8")
        size = (folder / TOKENS).stat().st_size
        whole = len(self.offsets) == len(self.heads) + 1 > 1 and size == 4 * self.offsets[-1]
        if not whole:
            raise ValueError(f"data.cache_dir = {folder}: expected whole token files; this folder is broken, delete it")
        self.tokens = np.memmap(folder / TOKENS, "<i4", mode="r")

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, bos and eos of each document included."""
        return int(self.offsets[-1])

    def documents(self) -> Iterator[np.ndarray]:
        """Yield every document, int32 [tokens]."""
        for start, stop in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield np.asarray(self.tokens[start:stop])


def open_store(
    label: str, documents: Documents, tokenizer: Tokenizer, config: DataConfig, report: Report
) -> TokenStore:
    """Return the token store of these documents, tokenised now unless the cache holds it."""
    key = f"{DOCUMENT_LAYOUT} {hash_of_hashes(documents.hashes)} {tokenizer.fingerprint}"
    folder = cache_folder(config.cache_dir, "tokens") / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.exists():
        write_folder_once(folder, _tokenise(label, documents, tokenizer, report))
    store = TokenStore(folder)
    report(f"tokens: {label}: {store.num_documents:,} documents, {store.num_tokens:,} tokens")
    return store


def _tokenise(label: str, documents: Documents, tokenizer: Tokenizer, report: Report) -> dict[str, np.ndarray]:
    """Return the arrays of a store by file."""
    parts, lengths, heads = [], [0], []
    total_bytes, done_bytes = documents.num_bytes, 0
    last_report = time.monotonic()
    for texts, batch_bytes in _batches(documents.texts):
        encoded, encoded_heads = tokenizer.encode_documents(texts)
        parts.extend(encoded)
        lengths.extend(len(ids) for ids in encoded)
        heads.extend(encoded_heads)
        done_bytes += batch_bytes
        if time.monotonic() - last_report > REPORT_EVERY_S:
            last_report = time.monotonic()
            report(f"tokens: {label}: {done_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB of text")
    tokens, offsets = np.concatenate(parts).astype("<i4"), np.cumsum(lengths).astype("<i8")
    return {TOKENS: tokens, OFFSETS: offsets, HEADS: np.array(heads, "<i8")}


def _batches(texts: tuple[Text, ...]) -> Iterator[tuple[list[Text], int]]:
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += num_bytes(text)
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size
