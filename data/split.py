"""Which documents are held out: decided by the content of each document, whatever its path, order or source."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data.config import DataConfig

SplitName = Literal["train", "validation"]


class Text(NamedTuple):
    """One document: its text is learned, the prompt before it is only read."""

    text: str
    prompt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Distinct documents of one source with their content hashes, in the order of the hashes."""

    texts: tuple[Text, ...]
    hashes: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts and prompts."""
        return sum(map(num_bytes, self.texts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The rule: a document is held out when its hash says so, or when it is named in `extra`."""

    fraction: float
    extra: frozenset[bytes] = frozenset()

    def holds_out(self, content: bytes) -> bool:
        """Return whether the document with this content hash belongs to validation."""
        return _held_out_by_hash(content, self.fraction) or content in self.extra


def num_bytes(text: Text) -> int:
    """Return the UTF-8 bytes of a document, its prompt included."""
    return len(text.text.encode()) + len(text.prompt.encode())


def content_hash(text: Text) -> bytes:
    """Return the SHA-256 of a text's UTF-8 bytes; with a prompt, that of both their hashes, prompt first."""
    own = hashlib.sha256(text.text.encode()).digest()
    return hashlib.sha256(hashlib.sha256(text.prompt.encode()).digest() + own).digest() if text.prompt else own


def hash_of_hashes(hashes: Iterable[bytes]) -> str:
    """Return one hexadecimal name for a sequence of documents, order included."""
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def order_by_content(texts: Iterable[Text]) -> Documents:
    """Return the distinct documents with a text in the order of their content hashes."""
    by_hash = {content_hash(text): text for text in texts if text.text}
    hashes = tuple(sorted(by_hash))
    return Documents(texts=tuple(by_hash[content] for content in hashes), hashes=hashes)


def make_split(documents: Mapping[str, Documents], config: DataConfig) -> Split:
    """Choose the held-out documents of all local sources together, so that none is held out here and trained on there.

    A source of which no document falls into `validation_fraction` gives the one that comes nearest to it.
    Raises ValueError for a source with fewer than two distinct documents.
    """
    extra = set()
    for name, found in documents.items():
        if len(found.hashes) < 2:
            expected = "at least 2 different non-empty documents, one to train on and one to hold out"
            raise ValueError(f"data.sources.{name} = {len(found.hashes)} documents: expected {expected}")
        nearest = min(found.hashes, key=_held_out_value)
        if not _held_out_by_hash(nearest, config.validation_fraction):
            extra.add(nearest)
    return Split(fraction=config.validation_fraction, extra=frozenset(extra))


def select(documents: Documents, split: Split, *, held_out: bool) -> Documents:
    """Return the documents on one side of the split, order kept."""
    kept = [i for i, content in enumerate(documents.hashes) if split.holds_out(content) == held_out]
    return Documents(
        texts=tuple(documents.texts[i] for i in kept),
        hashes=tuple(documents.hashes[i] for i in kept),
    )


def _held_out_value(content: bytes) -> int:
    """Return the last 8 bytes of the hash: the first ones decide the order, which must say nothing about the split."""
    return int.from_bytes(content[-8:], "big")


def _held_out_by_hash(content: bytes, fraction: float) -> bool:
    return _held_out_value(content) < fraction * 2**64
