"""Where a process stands among those of a run, as whoever started it says."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """rank of `size` processes; local_rank: on its machine. address: where they meet, tcp://HOST:PORT.

    attempt: how often the run's processes were started again. folder: of whoever started this one and watches, or none.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    attempt: int = 0
    folder: str = ""


SINGLE = Placement(rank=0, size=1, local_rank=0, address="")
"""One process."""
