"""Ranks that write and read one checkpoint together: all of them come to the same outcome, whoever fails."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from trainer.manifest import CheckpointError

T = TypeVar("T")


class Crew(Protocol):
    """All ranks that share a checkpoint, in order. They call `gather` in the same order, from one thread each."""

    @property
    def rank(self) -> int:
        """This one's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def gather(self, thing: Any) -> list[Any]:
        """What every rank has given, in order, on all of them; raises when one of them is gone."""
        ...


class Alone:
    """The crew of one process."""

    rank, size = 0, 1

    def gather(self, thing: Any) -> list[Any]:
        """A list of that one thing."""
        return [thing]


ALONE = Alone()


class Trouble(CheckpointError):
    """What went wrong on the first of the ranks on which something did. kind: the name of the error's class."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class Lost(CheckpointError):
    """A rank that does not answer any more: nobody knows how far the others came."""


def together(crew: Crew, action: Callable[[], T]) -> list[T]:
    """What `action` returned on each rank, which is small.

    Raises Trouble on all ranks when it raised on any, naming the first; Lost when a rank is gone.
    """
    mine: T | None = None
    trouble, cause = None, None
    try:
        mine = action()
    except Exception as error:
        known = isinstance(error, OSError | CheckpointError)
        trouble, cause = (type(error).__name__, str(error) if known else f"{type(error).__name__}: {error}"), error
    try:
        everybody = crew.gather((trouble, mine))
    except Exception as error:
        raise Lost(f"a rank does not answer: {error or type(error).__name__}") from error
    for rank, (told, _) in enumerate(everybody):
        if told is not None:
            kind, text = told
            raise Trouble(f"rank {rank}: {text}" if crew.size > 1 else text, kind) from cause
    return [thing for _, thing in everybody]


def first(crew: Crew, action: Callable[[], Any]) -> Any:
    """What `action` returned on rank 0, which alone does it; all learn the outcome, as in `together`."""
    return together(crew, lambda: action() if crew.rank == 0 else None)[0]
