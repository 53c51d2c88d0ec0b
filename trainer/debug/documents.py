"""The documents of a row: where they lie, how they begin, and which document of which source each one is."""

from dataclasses import dataclass

from data.batch import Batch
from data.stream import Stream
from data.tokenizer import Tokenizer

FIRST_TOKENS = 48
FIRST_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A piece of a document in a row: tokens first to last of it, and its first words.

    It is tokens `start`.. of document `number` of chunk `chunk` of the source, in the epoch's order (data/chunks.py).
    """

    piece: int
    first: int
    last: int
    text: str
    source: str
    epoch: int
    chunk: int
    number: int
    start: int

    def __str__(self) -> str:
        place = f"number {self.number} of chunk {self.chunk} in epoch {self.epoch} of {self.source}"
        from_token = f", from its token {self.start}" if self.start else ""
        return f"document {self.piece} (positions {self.first} to {self.last}; {place}{from_token}): {self.text!r}"


def spans(one: Batch) -> list[slice]:
    """The positions of each document of a row (a batch of one), in order, without the padding."""
    document_T = one.document_BT[0].tolist()
    starts = [t for t, piece in enumerate(document_T) if piece >= 0 and (t == 0 or document_T[t - 1] != piece)]
    filled = sum(piece >= 0 for piece in document_T)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], filled], strict=True)]


def cut(one: Batch, span: slice) -> Batch:
    """These positions of a row as a row."""
    return Batch(
        token_BT=one.token_BT[:, span],
        target_BT=one.target_BT[:, span],
        document_BT=one.document_BT[:, span],
        position_BT=one.position_BT[:, span],
        source_B=one.source_B,
    )


def name(one: Batch, stream: Stream, segment: int, number: int, tokenizer: Tokenizer) -> list[Document]:
    """Row `number` of a segment of the stream, document by document."""
    origin = stream.origin(segment, number)
    source = stream.source_names[int(one.source_B[0])]
    pieces = zip(spans(one), origin.documents.tolist(), origin.starts.tolist(), strict=True)
    return [
        Document(
            piece=piece,
            first=span.start,
            last=span.stop - 1,
            text=_short(tokenizer.decode(one.token_BT[0, span][:FIRST_TOKENS].tolist())),
            source=source,
            epoch=origin.epoch,
            chunk=origin.chunk,
            number=document,
            start=start,
        )
        for piece, (span, document, start) in enumerate(pieces)
    ]


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= FIRST_CHARACTERS else words[: FIRST_CHARACTERS - 3] + "..."
