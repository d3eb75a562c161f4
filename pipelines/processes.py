"""Whether a process that was written down still lives: its pid and when it started, as a text that no clock moves.

The same law as in infra/local/processes.py, which these packages may not import; a test holds that the two agree.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

__all__ = ["is_alive", "start_mark"]


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]


def start_mark(pid: int) -> str | None:
    """When the process started, as an opaque text; None if it is gone or a zombie.

    Equal texts: the same process. The text survives changes of the clock and differs after a reboot.
    """
    if sys.platform.startswith("linux"):
        try:
            # psutil's create_time moves with the wall clock; the kernel's ticks since boot do not.
            state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            # The first thread of a killed process is a zombie while others still hold its sockets.
            if state in "ZX" and len(list(Path(f"/proc/{pid}/task").iterdir())) <= 1:
                return None
        except (FileNotFoundError, ProcessLookupError):
            return None
        return f"{_boot()}-{rest[18]}"
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


def is_alive(pid: int, mark: str | float | None) -> bool:
    """Whether the process with this pid is the one whose mark was written down.

    A number is the former mark, seconds since 1970: records that an earlier release left are still read.
    """
    if mark is None:
        return False
    if isinstance(mark, str):
        return start_mark(pid) == mark
    import psutil

    try:
        return start_mark(pid) is not None and round(float(psutil.Process(pid).create_time()), 2) == mark
    except psutil.NoSuchProcess:
        return False
