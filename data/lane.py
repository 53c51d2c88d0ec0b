"""The rows of one source in one segment of a run: chunk after chunk, each packed and put in a keyed order."""

import bisect
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.batch import Row
from data.chunks import Chunks
from data.pack import Packing, pack
from data.permute import Permutation, derive_key
from data.split import SplitName

PLANS_IN_MEMORY = 4
"""Packed chunks kept per lane: neighbouring rows share one; 10,000 rows of 5 documents take about 1 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    packing: Packing
    order: np.ndarray
    """Which packed row comes at each place: int64 [rows]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a row comes from: pieces of `documents`, numbered within a chunk of an epoch, from tokens `starts` on."""

    epoch: int
    chunk: int
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Lane:
    """Rows 0, 1, 2, ... of one source, from the chunk at `first_position` on."""

    def __init__(
        self, chunks: Chunks, *, source: int, row_length: int, first_position: int, seed: int, split: SplitName
    ) -> None:
        """Describe the lane; nothing is read before a row is asked for."""
        self._chunks, self._source, self._row_length = chunks, source, row_length
        self._first_position, self._seed, self._split = first_position, seed, split
        self._ends: list[int] = []
        """The number of rows up to the end of each chunk, as far as known."""
        self._plan = lru_cache(PLANS_IN_MEMORY)(self._make_plan)

    def row(self, index: int) -> Row:
        """Return row `index`; finding it packs every chunk before it once in the life of this object."""
        origin = self.origin(index)
        return Row(
            chunk=self._chunks.load(origin.epoch, origin.chunk),
            documents=origin.documents,
            starts=origin.starts,
            lengths=origin.lengths,
            source=self._source,
        )

    def origin(self, index: int) -> Origin:
        """Return where the pieces of row `index` come from, in their order."""
        self._count(index + 1)
        passed = bisect.bisect_right(self._ends, index)
        epoch, number = self._place(self._first_position + passed)
        plan = self._plan(epoch, number)
        row = plan.order[index - (self._ends[passed - 1] if passed else 0)]
        pieces = slice(plan.packing.row_starts[row], plan.packing.row_starts[row + 1])
        return Origin(
            epoch=epoch,
            chunk=number,
            documents=plan.packing.documents[pieces],
            starts=plan.packing.starts[pieces],
            lengths=plan.packing.lengths[pieces],
        )

    def next_position(self, rows: int) -> int:
        """Return the position of the first chunk that the first `rows` rows do not touch.

        Raises ValueError when the source has no document of this split.
        """
        self._count(rows)
        return self._first_position + (bisect.bisect_left(self._ends, rows) + 1 if rows else 0)

    def _count(self, rows: int) -> None:
        total = self._ends[-1] if self._ends else 0
        while total < rows:
            position = self._first_position + len(self._ends)
            whole_epoch_seen = self._chunks.locate(position)[0] > self._chunks.locate(self._first_position)[0]
            if whole_epoch_seen and total == 0:
                expected = "at least one: more documents or another data.validation_fraction"
                found = f"no {self._split} document"
                raise ValueError(f"data.sources.{self._chunks.name} = {found}: expected {expected}")
            total += self._plan(*self._place(position)).packing.num_rows
            self._ends.append(total)

    def _place(self, position: int) -> tuple[int, int]:
        """Return epoch and number of a chunk; validation knows one epoch, which comes again and again."""
        epoch, number = self._chunks.locate(position)
        return (epoch if self._split == "train" else 0), number

    def _make_plan(self, epoch: int, number: int) -> _Plan:
        packing = pack(self._chunks.lengths(epoch, number), self._row_length)
        if packing.num_rows == 0:
            return _Plan(packing=packing, order=np.zeros(0, np.int64))
        key = derive_key(self._seed, "rows", self._chunks.name, self._row_length, epoch, number)
        order = Permutation(size=packing.num_rows, key=key)
        return _Plan(packing=packing, order=order(np.arange(packing.num_rows)))
