"""Data configuration: where text comes from, how it becomes ids and rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Report = Callable[[str], None]
"""Takes one line of progress for the user."""
SourceKind = Literal["stdlib", "text", "jsonl", "parquet", "stream"]
RECORD_KINDS = ("jsonl", "parquet", "stream")
"""Kinds whose documents are fields of records."""
TokenizerKind = Literal["bpe", "deepseek", "file"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of documents.

    stdlib: the Python standard library's own .py files. text: one document per file. jsonl, parquet: one per record,
    from `field`. stream: `datasets.load_dataset(path, name, split, streaming=True)`, one per record, `path` a hub
    name, a local folder or, with `name` such as "json" or "parquet", `path` a file or fsspec address.
    """

    kind: SourceKind
    path: str = ""
    """File, folder or glob; hub name for `stream`."""
    field: str = "text"
    prompt_field: str | None = None
    """Field whose text is put before the document's: it is read and not learned. None: everything is learned."""
    name: str | None = None
    split: str = "train"
    weight: int = 1
    """Rows drawn from this source per period of the mixture (an integer, so that any position is O(1) to find)."""

    def __post_init__(self) -> None:
        _require(self.kind == "stdlib" or self.path != "", "path", repr(self.path), f"a path for kind={self.kind}")
        without = f"null: kind={self.kind} has no fields"
        _require(self.prompt_field is None or self.kind in RECORD_KINDS, "prompt_field", self.prompt_field, without)
        other = f"another field than field={self.field}"
        _require(self.prompt_field != self.field, "prompt_field", self.prompt_field, other)
        _require(self.weight > 0, "weight", self.weight, "a positive integer")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """bpe: byte-level BPE trained once on the corpus. deepseek: the released vocabulary. file: a tokenizer.json."""

    kind: TokenizerKind
    vocab_size: int = 1024
    """Entries of a trained BPE, special tokens included."""
    path: str = ""

    def __post_init__(self) -> None:
        _require(
            self.vocab_size >= 260, "vocab_size", self.vocab_size, "at least 260: 256 bytes, 3 special tokens, a merge"
        )
        _require(self.kind != "file" or self.path != "", "path", repr(self.path), "the path of a tokenizer.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Sources by name, the tokenizer, and the packing."""

    sources: dict[str, SourceConfig]
    tokenizer: TokenizerConfig
    cache_dir: str = ".cache"
    """Trained tokenizers and token files, by content hash; safe to delete."""
    chunk_documents: int = 16384
    """Documents packed together; below 10,000 the rows fill less well (measured: 64 gives 0.950)."""
    validation_fraction: float = 0.02
    """Share of the documents, chosen by content hash, that no training row ever contains."""

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "sources", dict(self.sources), "at least one source")
        _require(self.chunk_documents > 0, "chunk_documents", self.chunk_documents, "a positive number")
        _require(0 < self.validation_fraction < 0.5, "validation_fraction", self.validation_fraction, "in (0, 0.5)")


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key} = {value}: expected {expected}")
