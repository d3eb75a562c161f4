"""Load of every node of a run beside the curves: CPU, memory, disk, network, GPUs, by training step.

One rank of each node reads, all ranks meet at the end of a window, rank 0 makes points of it. So they travel and resume
as all other points do: none is missing after a resume and none comes twice. Names are MLflow's own for system metrics.
"""

from __future__ import annotations

import math
import re
import socket
import time

import psutil
import torch

from pipelines.training.gpus import READINGS, GpuReader
from pipelines.training.parallel import Ranks

__all__ = ["NodeLoad"]

NAME_BYTES = 48
MEGABYTE = 1e6
# What `_read` gives, in this order: seconds and bytes, counted since the machine started or as they stand now.
HOST = ("busy", "cpu", "memory", "memory_of", "disk", "disk_free", "received", "sent")


class NodeLoad:
    """`join` once, then a call at the end of every window; both collective. Without `every_seconds` neither costs."""

    def __init__(self, ranks: Ranks, node: str, reads: bool, every_seconds: float | None) -> None:
        """`node`: id of the machine, where one host may carry several; `reads`: this rank is the one that reads."""
        self._ranks, self._node, self._every = ranks, node, every_seconds
        self._reads = reads and every_seconds is not None
        self._gpus = GpuReader(every_seconds or 1.0) if self._reads and ranks.device.type == "cuda" else None
        self._names: list[str] = []  # By node; on every rank.
        self._place = -1  # This rank's node, if it reads.
        self._most_gpus = 0
        self._before: torch.Tensor | None = None
        self._taken = 0.0
        self._said = False  # A run shorter than `every_seconds` has its load once, at its end.

    def join(self) -> None:
        """Every rank learns how many nodes there are, and how many GPUs the largest has."""
        if self._every is None:
            return
        sent = torch.zeros(self._ranks.world_size, 2, NAME_BYTES, dtype=torch.int64, device=self._ranks.device)
        if self._reads:
            host = re.sub(r"[^\w.-]", "_", socket.gethostname()) or "node"
            for row, text in enumerate((host, self._node)):
                letters = list(text.encode("ascii", "replace")[:NAME_BYTES])
                sent[self._ranks.rank, row, : len(letters)] = torch.tensor(letters, dtype=torch.int64)
        read = [
            tuple(bytes(letters).rstrip(b"\0").decode() for letters in rank) for rank in self._ranks.sum(sent).tolist()
        ]
        readers = [rank for rank, (host, _) in enumerate(read) if host]
        hosts = [read[rank][0] for rank in readers]
        self._names = [
            host if hosts.count(host) == 1 else f"{host}-{read[rank][1][:8] or rank}"
            for rank, host in zip(readers, hosts, strict=True)
        ]
        self._place = readers.index(self._ranks.rank) if self._ranks.rank in readers else -1
        self._most_gpus = max(self._ranks.of_all(self._gpus.count if self._gpus else 0))
        self._before, self._taken = self._gather(), time.monotonic()

    def __call__(self, last: bool = False) -> dict[str, float]:
        """Points of rank 0 by name, where it is time for them or this window is the `last`; else nothing."""
        if self._every is None or not self._names:
            return {}
        found, now = self._gather(), time.monotonic()
        due = now - self._taken >= self._every or (last and not self._said)
        if self._ranks.rank != 0 or not due:
            return {}
        assert self._before is not None
        points: dict[str, float] = {}
        for name, before, after in zip(self._names, self._before.tolist(), found.tolist(), strict=True):
            points |= {
                f"system/{name}/{key}": value for key, value in _points(before, after, now - self._taken).items()
            }
        self._before, self._taken, self._said = found, now, True
        return points

    def close(self) -> None:
        if self._gpus is not None:
            self._gpus.close()

    def _gather(self) -> torch.Tensor:
        """(nodes, readings) float64 on the CPU."""
        width = len(HOST) + self._most_gpus * len(READINGS)
        rows = torch.zeros(len(self._names), width, dtype=torch.float64)
        if self._place >= 0:
            gpus = [value for each in self._gpus.latest() for value in each] if self._gpus else []
            own = [*_read(), *gpus]
            own += [math.nan] * (width - len(own))
            rows[self._place] = torch.tensor(own, dtype=torch.float64)
        return self._ranks.sum(rows.to(self._ranks.device)).cpu()


def _read() -> list[float]:
    """What `HOST` names, of this machine."""
    cpu, memory, disk = psutil.cpu_times(), psutil.virtual_memory(), psutil.disk_usage("/")
    total = sum(cpu) - getattr(cpu, "guest", 0.0) - getattr(cpu, "guest_nice", 0.0)  # Guests count as user too.
    busy = total - cpu.idle - getattr(cpu, "iowait", 0.0)
    nics = [nic for name, nic in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
    received, sent = sum(nic.bytes_recv for nic in nics), sum(nic.bytes_sent for nic in nics)
    used = memory.total - memory.available
    return [float(value) for value in (busy, total, used, memory.total, disk.used, disk.free, received, sent)]


def _points(before: list[float], after: list[float], seconds: float) -> dict[str, float]:
    old, new = dict(zip(HOST, before, strict=False)), dict(zip(HOST, after, strict=False))
    seconds = max(seconds, 1e-9)
    points = {
        "system_memory_usage_megabytes": new["memory"] / MEGABYTE,
        "system_memory_usage_percentage": 100.0 * new["memory"] / new["memory_of"],
        "disk_usage_megabytes": new["disk"] / MEGABYTE,
        "disk_usage_percentage": 100.0 * new["disk"] / max(new["disk"] + new["disk_free"], 1.0),
        "disk_available_megabytes": new["disk_free"] / MEGABYTE,
        "network_receive_megabytes_per_second": (new["received"] - old["received"]) / MEGABYTE / seconds,
        "network_transmit_megabytes_per_second": (new["sent"] - old["sent"]) / MEGABYTE / seconds,
    }
    if new["cpu"] > old["cpu"]:  # The kernel counts in hundredths of a second.
        points["cpu_utilization_percentage"] = 100.0 * (new["busy"] - old["busy"]) / (new["cpu"] - old["cpu"])
    gpus = after[len(HOST) :]
    for number in range(len(gpus) // len(READINGS)):
        own = gpus[number * len(READINGS) : (number + 1) * len(READINGS)]
        points |= {f"gpu_{number}_{key}": value for key, value in zip(READINGS, own, strict=True)}
    return {key: value for key, value in points.items() if math.isfinite(value)}
