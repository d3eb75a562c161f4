"""Start a server in its own session, with a log of bounded size, and wait until it answers."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.errors import StackError
from infra.local.processes import Process, identify

__all__ = ["Watch", "detach", "http_status", "rotate", "tail"]

LOG_BYTES = 8 << 20
# The background process belongs to nobody but init: no zombie waits for a caller that lives long.
DETACH = 'cd "$1" && log="$2" && shift 2 && { "$@" </dev/null >>"$log" 2>&1 & echo $!; }'


@dataclass(frozen=True, slots=True)
class Watch:
    """How long a start may take, and whether the person at the keyboard has given up."""

    seconds: float
    cancelled: threading.Event = field(default_factory=threading.Event)

    def until(self, title: str, log: Path, ready: Callable[[], bool], alive: Callable[[], bool]) -> None:
        """Poll `ready`; StackError with the last log lines if the process dies or the time is over."""
        deadline = time.monotonic() + self.seconds
        while not ready():
            if self.cancelled.is_set():
                raise StackError(f"start of the {title} was interrupted; run `vit up` again")
            if not alive():
                raise StackError(f"the {title} stopped at its start; the end of {log}:\n{tail(log)}")
            if time.monotonic() > deadline:
                raise StackError(
                    f"the {title} did not answer within {self.seconds:.0f} s; run `vit up` again; the end of {log}:\n"
                    + tail(log)
                )
            self.cancelled.wait(0.2)


def detach(command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> tuple[Process, int]:
    """Start `command` in a new session, as nobody's child; returns the process and the session's number."""
    rotate(log)
    shell = subprocess.Popen(
        ["/bin/sh", "-c", DETACH, "detach", str(folder), str(log), *command],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        umask=0o077,
    )
    out, error = shell.communicate()
    process = identify(int(out)) if shell.returncode == 0 else None
    if process is None:
        raise StackError(f"{command[0]} stopped at its start; the end of {log}:\n{error.decode()}{tail(log)}")
    return process, shell.pid


def rotate(log: Path) -> None:
    """Keep one older file; a start with a big log begins a new one."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_name(log.name + ".1"))


def tail(log: Path, lines: int = 15) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return "  (no log)"
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (empty log)"


def http_status(url: str, headers: Mapping[str, str] | None = None, seconds: float = 5.0) -> int | None:
    """Status code of a GET, without any proxy; None if nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=seconds) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def search_path(first: Path) -> str:
    """PATH with the folder of this interpreter first, so that `python` and `vit` in a job are ours."""
    rest = [part for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if part and part != str(first)]
    return os.pathsep.join([str(first), *rest])
