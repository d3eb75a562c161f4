"""Processes as (pid, start time): a pid alone may have passed on to another program.

A zombie counts as dead. Of a part's processes, those that left no record are found by the mark in their environment, by
their session and by their parents.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from infra.endpoints import PART_MARK

__all__ = ["Process", "identify", "members", "memory_pss", "stop"]


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    started: str  # Equal texts: the same process. Survives clock changes; differs after a reboot.
    name: str = field(default="", compare=False)

    def is_alive(self) -> bool:
        return start_time(self.pid) == self.started


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]


def start_time(pid: int) -> str | None:
    """When the process started, as an opaque text; None if it is gone or a zombie."""
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


def identify(pid: int, name: str = "") -> Process | None:
    started = start_time(pid)
    return Process(pid, started, name) if started else None


def members(mark: str, recorded: Iterable[Process], sessions: Collection[int]) -> list[Process]:
    """Every living process of a part: recorded, marked, nameless in its sessions, and all their descendants."""
    import psutil

    found = {process.pid: process for process in recorded if process.is_alive()}
    parents: dict[int, int] = {}
    mine = os.getuid()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != mine:
                continue
            parents[process.pid] = process.ppid()
            if process.pid not in found and _belongs(process.pid, process.environ(), mark, sessions):
                _add(found, process.pid)
    while grown := [pid for pid, parent in parents.items() if parent in found and pid not in found]:
        for pid in grown:
            _add(found, pid)
            parents.pop(pid)
    return list(found.values())


def _belongs(pid: int, environment: dict[str, str], mark: str, sessions: Collection[int]) -> bool:
    if environment.get(PART_MARK) == mark:
        return True
    # Ray writes its process titles over the environment, so such a process shows none at all. The leader of a session
    # of ours has always exited; a living one means that the number was given to somebody else.
    return "PATH" not in environment and os.getsid(pid) in sessions and start_time(os.getsid(pid)) is None


def _add(found: dict[int, Process], pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        if process := identify(pid, psutil.Process(pid).name()):
            found[pid] = process


def send(processes: Iterable[Process], number: int) -> None:
    for process in processes:
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def wait_gone(processes: Iterable[Process], seconds: float) -> list[Process]:
    """Those that still live after `seconds`."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if process.is_alive()]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if process.is_alive()]
    return left


def stop(living: Callable[[], list[Process]], turn: Callable[[Process], int], seconds: float) -> list[Process]:
    """SIGTERM to the processes of turn 0, then of turn 1 and so on; SIGKILL to what is left after `seconds`."""
    stopped = living()
    turns = sorted({turn(process) for process in stopped})
    for number in turns:
        group = [process for process in stopped if turn(process) == number]
        send(group, signal.SIGTERM)
        wait_gone(group, seconds / len(turns))
    for _ in range(5):  # A dying parent may leave a child that was born after the list was made.
        if not (left := living()):
            break
        send(left, signal.SIGKILL)
        wait_gone(left, 2)
        stopped += [process for process in left if process not in stopped]
    return stopped


def memory_pss(processes: Iterable[Process]) -> int:
    """Proportional set size in bytes: shared pages are counted once over all."""
    import psutil

    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            memory = psutil.Process(process.pid).memory_full_info()
            total += getattr(memory, "pss", memory.uss)
    return total
