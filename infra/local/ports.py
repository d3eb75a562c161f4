"""Free TCP ports on loopback: found once, kept over restarts."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Collection, Iterable

from infra.local.errors import StackError

__all__ = ["choose", "holder", "is_free", "soon_free"]

# Under the kernel's range for outgoing connections (32768 up), so that none of those takes a kept port, and above the
# range that Ray gives to its workers (10002 to 19999).
LOWEST, HIGHEST = 20000, 32767


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Connections that just closed do not count.
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)  # On Linux two may bind with SO_REUSEADDR; only one may listen.
        except OSError:
            return False
    return True


def soon_free(port: int, seconds: float = 1.0) -> bool:
    """Free now, or in a moment: a connection that is just closing may hold it."""
    deadline = time.monotonic() + seconds
    while not (free := is_free(port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return free


def choose(names: Iterable[str], taken: Collection[int]) -> dict[str, int]:
    """One free port for each name, none of `taken`."""
    ports: dict[str, int] = {}
    candidates = iter(random.sample(range(LOWEST, HIGHEST + 1), 2000))
    for name in names:
        port = next((p for p in candidates if p not in taken and is_free(p)), None)
        if port is None:
            raise StackError(
                f"no free port for {name} among 2000 tried between {LOWEST} and {HIGHEST}; close some servers"
            )
        ports[name] = port
    return ports


def holder(port: int) -> str:
    """Who listens on the port, as far as this user may see."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another program"
