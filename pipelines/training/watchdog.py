"""A worker that gets no further ends itself, and leaves word of where each of its threads stood.

Ray waits for a silent worker for ever, and a collective for as long as its timeout; a dead one is replaced in seconds.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

__all__ = ["EXIT_CODE", "Watchdog", "stacks"]

T = TypeVar("T")
EXIT_CODE = 70


def stacks() -> str:
    """Where every thread of this process stands, innermost call first. Works while they hold the GIL in turns."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


class Watchdog:
    """Watches from a thread while the block runs; `beat` says that there is progress."""

    def __init__(self, seconds: float | None, report: Callable[[str], None]) -> None:
        """`report` gets the stacks, before the process ends with EXIT_CODE. None: nothing is watched."""
        self._seconds, self._report = seconds, report
        self._beat = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        self._beat = time.monotonic()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; each is a sign of life."""
        for item in items:
            self.beat()
            yield item

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            self.beat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._ended.wait(min(5.0, self._seconds / 4)):
            if time.monotonic() - self._beat > self._seconds:
                reporting = threading.Thread(target=self._report, args=(stacks(),), daemon=True)
                reporting.start()
                reporting.join(30.0)  # The store may be what everything waits for.
                os._exit(EXIT_CODE)  # The main thread may stand in C code, where no exception reaches it.
