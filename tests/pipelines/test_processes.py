"""A process is known by pid and start mark; pipelines and infra, which import nothing of each other, agree on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from infra.local.processes import start_time
from pipelines.processes import is_alive, start_mark


def test_both_packages_write_the_same_mark() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for pid in (os.getpid(), os.getppid(), child.pid):
            assert start_mark(pid) == start_time(pid) is not None
        child.kill()
        deadline = time.monotonic() + 5
        while "Z" not in Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2]:
            assert time.monotonic() < deadline
        assert start_mark(child.pid) is start_time(child.pid) is None
    finally:
        child.kill()
        child.wait()
    assert start_mark(child.pid) is start_time(child.pid) is None


def test_a_pid_that_passed_on_to_another_program_is_not_the_one_that_was_written_down() -> None:
    mark = start_mark(os.getpid())
    assert mark is not None
    assert is_alive(os.getpid(), mark)
    assert not is_alive(os.getpid(), mark + "1")
    assert not is_alive(os.getpid(), None)
    assert not is_alive(2**22 + 1, mark)


def test_the_mark_of_an_earlier_release_is_read() -> None:
    started = round(psutil.Process().create_time(), 2)
    assert is_alive(os.getpid(), started)
    assert not is_alive(os.getpid(), started - 5)
    assert not is_alive(2**22 + 1, started)
