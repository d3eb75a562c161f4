"""The tests of the stack start stacks of their own; nothing of the caller's environment may lead them elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("VIT_", "AWS_", "RAY_", "MLFLOW_")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(NAMES):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


LISTENER = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(server.getsockname()[1], flush=True)
time.sleep(600)
"""


@contextmanager
def listening(port: int) -> Iterator[tuple[int, int]]:
    """A program of somebody else that listens on the port (0: any); its pid and port."""
    program = subprocess.Popen([sys.executable, "-c", LISTENER, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout
        yield program.pid, int(program.stdout.readline())
    finally:
        program.kill()
        program.communicate()


@pytest.fixture
def listener() -> Iterator[tuple[int, int]]:
    with listening(0) as found:
        yield found
