"""Load of this machine's NVIDIA GPUs, as the driver's own `nvidia-smi` tells it: no package is needed for it."""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import threading

__all__ = ["READINGS", "GpuReader"]

log = logging.getLogger(__name__)

# Of each GPU, in the order of the query.
READINGS = ("utilization_percentage", "memory_usage_megabytes", "memory_usage_percentage", "power_usage_watts")
QUERY = "utilization.gpu,memory.used,memory.total,power.draw"
SECONDS = 20.0  # For one answer; the first one after a boot takes long.
MEBIBYTE = 1.048576  # In megabytes.


class GpuReader:
    """Asks in a thread of its own, since one answer takes up to a second."""

    def __init__(self, every_seconds: float) -> None:
        self._every = every_seconds
        self._closing = threading.Event()
        self._latest: list[list[float]] = ask()
        self.count = len(self._latest)
        if self.count:
            threading.Thread(target=self._run, name="gpu-load", daemon=True).start()

    def latest(self) -> list[list[float]]:
        """Of each GPU what `READINGS` names; NaN where the driver does not tell."""
        return self._latest

    def close(self) -> None:
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(self._every):
            found = ask()
            if len(found) == self.count:  # Else it failed, or a GPU fell off the bus: the last word stands.
                self._latest = found


def ask() -> list[list[float]]:
    """One row per GPU of this machine; none where nvidia-smi is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("nvidia-smi: %s", error)
        return []
    return [_row(line) for line in done.stdout.splitlines() if line.strip()]


def _row(line: str) -> list[float]:
    """ "37, 1024, 81559, 118.42" -> percent, megabytes, percent, watts; what is "[N/A]" is NaN."""
    used_percent, memory, memory_of, watts = ([_number(word) for word in line.split(",")] + [math.nan] * 4)[:4]
    return [used_percent, memory * MEBIBYTE, 100.0 * memory / memory_of if memory_of else math.nan, watts]


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan
