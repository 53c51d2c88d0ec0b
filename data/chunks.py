"""Documents in chunks, the unit that is packed at once: what the row stream asks of a source, and the stored kind."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from data.batch import Chunk
from data.permute import Permutation, derive_key
from data.store import TokenStore

CHUNKS_IN_MEMORY = 4
"""Chunks of which the document numbers are kept (16 bytes a document); their tokens stay in the file."""


class Chunks(Protocol):
    """One source of tokenised documents, an endless sequence of chunks: position 0, 1, 2, ... through its epochs."""

    name: str

    @property
    def num_documents(self) -> int | None:
        """Documents of an epoch; None where only the end of a stream would tell."""

    @property
    def num_tokens(self) -> int | None:
        """Tokens of an epoch, bos and eos included; None where only the end of a stream would tell."""

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch and the number within it of the chunk at a position."""

    def lengths(self, epoch: int, number: int) -> np.ndarray:
        """Return the tokens of each document of a chunk, int64: all that packing needs."""

    def load(self, epoch: int, number: int) -> Chunk:
        """Return a chunk with its tokens."""

    def documents(self) -> Iterator[np.ndarray]:
        """Yield every document of one epoch once, int32 [tokens], in an order that never changes."""


class StoredChunks:
    """Chunks of a token store: in every epoch, a keyed permutation deals the documents to chunks of equal size."""

    def __init__(self, name: str, store: TokenStore, *, chunk_documents: int, seed: int) -> None:
        """Deal the documents of `store` to as few chunks of at most `chunk_documents` as they need."""
        self.name = name
        self.num_documents = store.num_documents
        self.num_tokens = store.num_tokens
        self._store, self._seed = store, seed
        self._num_chunks = -(-store.num_documents // chunk_documents)
        self._load = lru_cache(CHUNKS_IN_MEMORY)(self._load_chunk)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch and the number within it of the chunk at a position."""
        return divmod(position, self._num_chunks)

    def lengths(self, epoch: int, number: int) -> np.ndarray:
        """Return the tokens of each document of a chunk, int64."""
        return self.load(epoch, number).lengths

    def load(self, epoch: int, number: int) -> Chunk:
        """Return a chunk; its tokens are the whole store's, mapped into memory and read when used."""
        return self._load(epoch, number)

    def documents(self) -> Iterator[np.ndarray]:
        """Yield every document, int32 [tokens], in the order of the store."""
        return self._store.documents()

    def _load_chunk(self, epoch: int, number: int) -> Chunk:
        first = number * self.num_documents // self._num_chunks
        stop = (number + 1) * self.num_documents // self._num_chunks
        deal = Permutation(size=self.num_documents, key=derive_key(self._seed, "documents", self.name, epoch))
        documents = deal(np.arange(first, stop))
        starts = self._store.offsets[documents]
        return Chunk(
            tokens=self._store.tokens,
            starts=starts,
            lengths=self._store.offsets[documents + 1] - starts,
            heads=self._store.heads[documents],
        )
