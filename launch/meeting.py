"""Where the ranks of this machine meet, and what each finds in its environment."""

import contextlib
import socket
import sys
from collections.abc import Iterator, Mapping

HOST = "127.0.0.1"
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


def environment(given: Mapping[str, str], rank: int, size: int, port: int) -> dict[str, str]:
    """What a rank finds in its environment: ours, its place, one thread for each operation, no network but our own."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": HOST, "MASTER_PORT": port}
    defaults = {"OMP_NUM_THREADS": "1"}
    if sys.platform in LOOPBACK:
        # Else gloo takes the address that the machine's name has, where it has one.
        defaults["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    return defaults | dict(given) | {name: str(value) for name, value in place.items()}


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that rank 0 can listen on and nobody else is given.

    Bound here and not listened on: so the system hands it to no other process, while on Linux rank 0 may bind it, too,
    for both allow it (SO_REUSEADDR). Elsewhere it must be free for that, and only was so a moment ago.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port
