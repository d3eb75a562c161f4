"""A second node on this machine: a raylet of its own that joins the cluster of RAY_ADDRESS and may be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Raylet", "wait_for"]


def wait_for(what: Callable[[], Any], seconds: float = 180.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:.0f} s in vain")


class Raylet:
    """A node with `cpus` logical CPUs. Its temp folder is its own: nodes that share one delete each other's files."""

    def __init__(self, cpus: int) -> None:
        import ray

        before = {node["NodeID"] for node in ray.nodes()}
        # A short name: sockets lie in it.
        self._folder = tempfile.TemporaryDirectory(prefix="vn-", ignore_cleanup_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-P", str(Path(__file__).with_name("raylet.py")), "start", "--block"]
        command += [f"--address={os.environ['RAY_ADDRESS']}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        command += [f"--num-cpus={cpus}", f"--object-store-memory={80 << 20}", f"--temp-dir={self._folder.name}"]
        command += [f"--dashboard-agent-listen-port={port}"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._log = Path(self._folder.name, "start.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._family: list[psutil.Process] = []

        def joined() -> str | None:
            assert self._process.poll() is None, self._log.read_text()
            new = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in before]
            return new[0] if new else None

        self.id: str = wait_for(joined, 90.0)
        self._family = psutil.Process(self._process.pid).children(recursive=True)

    def kill(self) -> None:
        """As if its power were cut: the raylet and all that runs on the node, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        for process in sorted(self._family, key=lambda process: process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def drain(self, seconds: int) -> None:
        """What a cloud's notice becomes: the node takes nothing more, and will be gone after `seconds`."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={os.environ['RAY_ADDRESS']}"]
        command += [f"--node-id={self.id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        command += [f"--deadline-remaining-seconds={seconds}"]
        subprocess.run(command, check=True, capture_output=True, timeout=90)

    def close(self) -> None:
        self.kill()
        self._process.wait()
        self._folder.cleanup()
