"""Where this process stands among those of a run, as whoever started it has put it into the environment."""

from collections.abc import Mapping
from typing import Any

from trainer.config import ParallelConfig
from trainer.parallel.placement import Placement

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process it starts, and what others have to."""
ATTEMPT, FOLDER = "KEEL_ATTEMPT", "KEEL_RANKS"
"""What our own supervisor sets beside them."""
PORTS = 65536


def from_environment(environment: Mapping[str, str], parallel: ParallelConfig) -> Placement | None:
    """What VARIABLES say; None where neither RANK nor WORLD_SIZE is set. One process needs no more than these two.

    Raises ValueError where a variable is missing or wrong, or the mesh has another size.
    """
    if not (environment.get("RANK") or environment.get("WORLD_SIZE")):
        return None
    mesh, size = parallel.mesh, _number(environment, "WORLD_SIZE", 1, None)
    if size != mesh.size:
        sizes = f"parallel.pipe={mesh.pipe} x parallel.context={mesh.context} x parallel.data={mesh.data}"
        own = "; keel starts them itself where RANK and WORLD_SIZE are not set" if mesh.size > 1 else ""
        processes = "process" if mesh.size == 1 else "processes"
        raise ValueError(f"WORLD_SIZE = {size}: expected {mesh.size} {processes}, the mesh of {sizes}{own}")
    rank = _number(environment, "RANK", 0, size)
    if size == 1:
        local_rank = _number(environment, "LOCAL_RANK", 0, None) if environment.get("LOCAL_RANK") else 0
        return Placement(rank=rank, size=1, local_rank=local_rank, address="", **_started(environment))
    host, port = _text(environment, "MASTER_ADDR"), _number(environment, "MASTER_PORT", 1, PORTS)
    return Placement(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", 0, size),
        address=f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}",
        **_started(environment),
    )


def _started(environment: Mapping[str, str]) -> dict[str, Any]:
    """Which attempt this is, by us or by torchrun, and the folder of our own supervisor."""
    attempt = environment.get(ATTEMPT) or environment.get("TORCHELASTIC_RESTART_COUNT") or "0"
    return {"attempt": int(attempt) if attempt.isdecimal() else 0, "folder": environment.get(FOLDER, "")}


def _text(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(name, "")
    if not text:
        raise ValueError(f"{name} = : expected all of {', '.join(VARIABLES)} in the environment, or none of them")
    return text


def _number(environment: Mapping[str, str], name: str, least: int, end: int | None) -> int:
    """A whole number from `least` on, below `end`."""
    text = _text(environment, name)
    number = int(text) if text.isdecimal() and text.isascii() else -1
    if number < least or (end is not None and number >= end):
        above = "" if end is None else f" to {end - 1}"
        raise ValueError(f"{name} = {text}: expected a whole number from {least}{above or ' on'}")
    return number
