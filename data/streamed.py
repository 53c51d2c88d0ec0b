"""Chunks of a stream: read, split and tokenised when they are needed; the number of the chunk is the only state."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.batch import Chunk
from data.cache import cache_folder, write_once
from data.config import DataConfig
from data.source import StreamReader
from data.split import Split, content_hash
from data.tokenizer import DOCUMENT_LAYOUT, Tokenizer

CHUNKS_IN_MEMORY = 2
"""The chunk in use and the one before or after it."""
NOTES_IN_MEMORY = 16
"""Notes are small and on disk; they are used in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkNote:
    """What is remembered of a chunk: the records read for it, and the tokens of each document kept (int64)."""

    records: int
    lengths: np.ndarray


class StreamedChunks:
    """Chunks of `chunk_documents` records in the order of the stream, each with the documents of one split.

    The lengths of every chunk seen are noted in the cache, so that a jump (a resumed run) counts rows without reading
    what lies before. A stream that then gives other documents is refused.
    """

    num_documents = None
    num_tokens = None

    def __init__(
        self,
        name: str,
        reader: StreamReader,
        tokenizer: Tokenizer,
        split: Split,
        config: DataConfig,
        *,
        held_out: bool,
    ) -> None:
        """Prepare to read the training documents, or the held-out ones."""
        self.name = name
        self._reader, self._tokenizer, self._split, self._held_out = reader, tokenizer, split, held_out
        self._chunk_documents = config.chunk_documents
        source = config.sources[name]
        fields = (source.field, source.prompt_field)
        records = (source.path, *fields, source.name, source.split, config.chunk_documents)
        key = repr((DOCUMENT_LAYOUT, *records, tokenizer.fingerprint, split.fraction, sorted(split.extra), held_out))
        self._folder = cache_folder(config.cache_dir, f"streams/{hashlib.sha256(key.encode()).hexdigest()[:32]}")
        self._num_chunks: int | None = None
        self._num_known = 0
        self._read = lru_cache(CHUNKS_IN_MEMORY)(self._read_chunk)
        self._checked = lru_cache(CHUNKS_IN_MEMORY)(self._check_chunk)
        self._note = lru_cache(NOTES_IN_MEMORY)(self._find_note)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch and the number within it of the chunk at a position; the last chunk of a stream is short."""
        while self._num_chunks is None and self._num_known <= position:
            ended = self._note(self._num_known).records < self._chunk_documents
            self._num_known += 1
            self._num_chunks = self._num_known if ended else None
        return (0, position) if self._num_chunks is None else divmod(position, self._num_chunks)

    def lengths(self, epoch: int, number: int) -> np.ndarray:
        """Return the tokens of each document of a chunk, int64."""
        return self._note(number).lengths

    def load(self, epoch: int, number: int) -> Chunk:
        """Return a chunk with its tokens in memory; raises ValueError when the stream no longer fits its notes."""
        return self._checked(number)

    def documents(self) -> Iterator[np.ndarray]:
        """Yield every document up to the end of the stream, int32 [tokens]."""
        position = 0
        while self.locate(position)[0] == 0:
            chunk = self.load(0, position)
            for start, length in zip(chunk.starts.tolist(), chunk.lengths.tolist(), strict=True):
                yield chunk.tokens[start : start + length]
            position += 1

    def _check_chunk(self, number: int) -> Chunk:
        note, (records, chunk) = self._note(number), self._read(number)
        if records != note.records or not np.array_equal(chunk.lengths, note.lengths):
            expected = f"the stream that {self._folder} has notes of; it gives other documents now, delete the notes"
            raise ValueError(f"data.sources.{self.name} = chunk {number}: expected {expected}")
        return chunk

    def _read_chunk(self, number: int) -> tuple[int, Chunk]:
        texts = self._reader.read(number * self._chunk_documents, self._chunk_documents)
        kept = [text for text in texts if text.text and self._split.holds_out(content_hash(text)) == self._held_out]
        encoded, heads = self._tokenizer.encode_documents(kept)
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        tokens = np.concatenate(encoded) if encoded else np.zeros(0, np.int32)
        starts = np.cumsum(lengths) - lengths
        return len(texts), Chunk(tokens=tokens, starts=starts, lengths=lengths, heads=np.array(heads, np.int64))

    def _find_note(self, number: int) -> ChunkNote:
        path = self._note_path(number)
        if path.exists():
            with np.load(path, allow_pickle=False) as arrays:
                return ChunkNote(records=int(arrays["records"]), lengths=arrays["lengths"])
        records, chunk = self._read(number)
        buffer = io.BytesIO()
        np.savez(buffer, records=records, lengths=chunk.lengths)
        write_once(path, buffer.getvalue())
        return ChunkNote(records=records, lengths=chunk.lengths)

    def _note_path(self, number: int) -> Path:
        return self._folder / f"chunk-{number:08d}.npz"
