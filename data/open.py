"""From a configuration to rows: find the text, split it, train or load the tokenizer, tokenise, open both streams."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from data.chunks import Chunks, StoredChunks
from data.config import DataConfig, Report
from data.source import StreamReader, read_documents
from data.split import Documents, Split, SplitName, content_hash, hash_of_hashes, make_split, select
from data.store import open_store
from data.stream import Segment, Stream
from data.streamed import StreamedChunks
from data.tokenizer import TRAINING_BYTES, Tokenizer, open_tokenizer, training_sample

VALIDATION_SEED = 0
"""Held-out rows are the same for every seed of a run, so that runs can be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """All that a run reads; `validation` has the segments of `train`, of which only the row lengths matter."""

    tokenizer: Tokenizer
    train: Stream
    validation: Stream
    fingerprint: str
    """Names the tokenizer and every document of the local sources: a resumed run must find the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """The opened sources by name: those read whole, those read by position, and the rule that splits both."""

    local: Mapping[str, Documents]
    readers: Mapping[str, StreamReader]
    split: Split


def open_data(config: DataConfig, segments: Sequence[Segment], seed: int, report: Report) -> Data:
    """Open the data of a run; slow once per corpus and tokenizer, from then on the cache is read.

    `report` takes lines of progress. Raises ValueError for anything in the configuration that cannot be opened.
    """
    texts = _open_texts(config, report)
    tokenizer = open_tokenizer(config, partial(_training_sample, config, texts), report)
    return Data(
        tokenizer=tokenizer,
        train=_open_split("train", config, texts, tokenizer, segments, seed, report),
        validation=_open_split("validation", config, texts, tokenizer, segments, VALIDATION_SEED, report),
        fingerprint=_fingerprint(texts, tokenizer),
    )


def _fingerprint(texts: _Texts, tokenizer: Tokenizer) -> str:
    found = [(name, hash_of_hashes(documents.hashes)) for name, documents in sorted(texts.local.items())]
    return hashlib.sha256(repr((tokenizer.fingerprint, found)).encode()).hexdigest()


def _open_texts(config: DataConfig, report: Report) -> _Texts:
    local = {}
    for name, source in sorted(config.sources.items()):
        if source.kind != "stream":
            local[name] = read_documents(name, source, report)
            report(f"data: {name}: {len(local[name].texts):,} documents, {local[name].num_bytes / 1e6:.1f} MB")
    readers = {
        name: StreamReader(name, source) for name, source in sorted(config.sources.items()) if source.kind == "stream"
    }
    return _Texts(local=local, readers=readers, split=make_split(local, config))


def _training_sample(config: DataConfig, texts: _Texts) -> Documents:
    """Return the text a tokenizer is trained on: training documents of every source, by the weights of the mixture.

    Local sources give their first documents (by hash, so a fair sample), streams those of their first chunk.
    """
    whole = sum(source.weight for source in config.sources.values())
    parts = []
    for name, source in sorted(config.sources.items()):
        if source.kind == "stream":
            records = [text for text in texts.readers[name].read(0, config.chunk_documents) if text.text]
            found = Documents(texts=tuple(records), hashes=tuple(content_hash(text) for text in records))
        else:
            found = texts.local[name]
        kept = select(found, texts.split, held_out=False)
        parts.append(training_sample(kept, TRAINING_BYTES * source.weight // whole))
    return Documents(
        texts=tuple(text for part in parts for text in part.texts),
        hashes=tuple(content for part in parts for content in part.hashes),
    )


def _open_split(
    split: SplitName,
    config: DataConfig,
    texts: _Texts,
    tokenizer: Tokenizer,
    segments: Sequence[Segment],
    seed: int,
    report: Report,
) -> Stream:
    held_out = split == "validation"
    names = sorted(config.sources)
    sources: list[Chunks] = []
    for name in names:
        if name in texts.readers:
            reader = texts.readers[name]
            report(f"tokens: {name} {split}: read from the stream as needed")
            sources.append(StreamedChunks(name, reader, tokenizer, texts.split, config, held_out=held_out))
        else:
            documents = select(texts.local[name], texts.split, held_out=held_out)
            store = open_store(f"{name} {split}", documents, tokenizer, config, report)
            sources.append(StoredChunks(name, store, chunk_documents=config.chunk_documents, seed=seed))
    stream = Stream(
        sources=sources,
        weights=[config.sources[name].weight for name in names],
        segments=segments,
        seed=seed,
        split=split,
        padding_id=tokenizer.pad_id,
    )
    stream.require_documents()
    return stream
