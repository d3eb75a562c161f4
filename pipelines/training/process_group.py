"""What a worker process does around training: meet the others, leave them, and take notice that it will be ended."""

from __future__ import annotations

import os
import signal
import socket
import threading
from datetime import timedelta

__all__ = ["GROUP_TIMEOUT_SECONDS", "is_noticed", "join_at_file", "leave", "listen"]

GROUP_TIMEOUT_SECONDS = 600.0  # Of a collective: a rank that is silent for so long is lost.
_noticed = threading.Event()


def listen() -> None:
    """From now on SIGTERM is a notice and not the end: SIGKILL follows when the time is over. In the main thread only.

    A machine that is taken away sends it to every process, some seconds to two minutes before.
    """
    _noticed.clear()
    signal.signal(signal.SIGTERM, lambda number, frame: _noticed.set())


def is_noticed() -> bool:
    """Whether this process was told that it will be ended."""
    return _noticed.is_set()


def join_at_file(backend: str, rank: int, world_size: int, path: str) -> None:
    """All ranks on this machine, over its loopback device."""
    import torch.distributed as dist

    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    dist.init_process_group(
        backend,
        init_method=f"file://{path}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_SECONDS),
    )


def leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
