"""The row stream: row number -> source -> chunk -> packed row. The number of the row is the only state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.batch import Batch, build_batch
from data.chunks import Chunks
from data.lane import Lane, Origin
from data.mixture import Blend
from data.split import SplitName


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of the run: `rows` rows of `row_length` tokens."""

    row_length: int
    rows: int

    def __post_init__(self) -> None:
        assert self.row_length > 0
        assert self.rows >= 0


class Stream:
    """All rows of one split, addressed by segment and row number; any order of calls gives the same rows.

    train: each segment takes whole chunks from where the one before it stopped; no piece of a document is seen twice
    within an epoch, and each epoch has an order of its own. validation: every segment starts at the first held-out
    chunk, and after the last held-out row the same rows come again.
    """

    def __init__(
        self,
        *,
        sources: Sequence[Chunks],
        weights: Sequence[int],
        segments: Sequence[Segment],
        seed: int,
        split: SplitName,
        padding_id: int,
    ) -> None:
        """Blend `sources` by integer `weights` into the rows of `segments`; nothing is read yet."""
        assert sources
        assert segments
        self.source_names = tuple(source.name for source in sources)
        self.segments = tuple(segments)
        self._sources: tuple[Chunks, ...] = tuple(sources)
        self._split: SplitName = split
        self._seed, self._padding_id = seed, padding_id
        self._blend = Blend(weights)
        self._lane = lru_cache(None)(self._make_lane)

    @property
    def num_documents(self) -> int | None:
        """Documents of this split in one epoch of every source; None when a source is a stream."""
        return _total([source.num_documents for source in self._sources])

    @property
    def num_tokens(self) -> int | None:
        """Tokens of this split in one epoch of every source, bos and eos included; None when a source is a stream."""
        return _total([source.num_tokens for source in self._sources])

    def documents(self) -> Iterator[np.ndarray]:
        """Yield every document of this split once, int32 [tokens], source after source; ends only where they do."""
        for source in self._sources:
            yield from source.documents()

    def rows(self, segment: int, first: int, count: int) -> Batch:
        """Return rows first to first + count of a segment, B = count and T = the segment's row length.

        A pure function of the arguments, the seed and the documents. In training the rows must lie in the segment.
        """
        assert first >= 0
        assert count >= 0
        assert self._split == "validation" or first + count <= self.segments[segment].rows
        sources, indices = self._blend.locate(np.arange(first, first + count))
        rows = [
            self._lane(segment, source).row(index)
            for source, index in zip(sources.tolist(), indices.tolist(), strict=True)
        ]
        return build_batch(rows, self.segments[segment].row_length, self._padding_id)

    def origin(self, segment: int, number: int) -> Origin:
        """Return where the pieces of one row of a segment come from, in their order."""
        (source,), (index,) = self._blend.locate(np.arange(number, number + 1))
        return self._lane(segment, int(source)).origin(int(index))

    def require_documents(self) -> None:
        """Raise ValueError when a source has no document of this split; reads at most one chunk of most streams."""
        for source in range(len(self._sources)):
            self._lane(0, source).next_position(1)

    def _make_lane(self, segment: int, source: int) -> Lane:
        first_position = 0
        if self._split == "train" and segment > 0:
            rows_before = int(self._blend.counts(self.segments[segment - 1].rows)[source])
            first_position = self._lane(segment - 1, source).next_position(rows_before)
        return Lane(
            self._sources[source],
            source=source,
            row_length=self.segments[segment].row_length,
            first_position=first_position,
            seed=self._seed,
            split=self._split,
        )


def _total(numbers: list[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
