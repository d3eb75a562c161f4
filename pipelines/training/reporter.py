"""Metrics, progress and the wish to stop travel in a thread of rank 0: the loop never waits for a network."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from pipelines import store
from pipelines.training.names import PROGRESS, STOP

__all__ = ["Log", "OpenLog", "Reporter"]

log = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
FLUSH_SECONDS = 30.0
MOST_NOTES = 50  # The newest; `noted` counts all.

Log = Callable[[dict[str, float], int], None]  # values, step; with a method `flush() -> bool` if it buffers
OpenLog = Callable[[], AbstractContextManager[Log]]


class Reporter:
    """`window` from the loop; everything else in the thread. A fault of tracking never ends the training."""

    def __init__(self, attempt_uri: str, open_log: OpenLog, every_seconds: float = EVERY_SECONDS) -> None:
        """`open_log` is entered in the thread, since it may import much, and left at the end."""
        self._attempt_uri, self._open_log, self._every = attempt_uri, open_log, every_seconds
        self._opened = contextlib.ExitStack()
        self._points: deque[tuple[dict[str, float], int]] = deque()
        self._progress: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._stop_wanted = False
        self.make_way: str | None = None  # Why the workers start again at once after this stop.
        self._handed_on: deque[tuple[dict[str, float], int]] = deque()
        self._log: Log | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    @property
    def stop_wanted(self) -> bool:
        return self._stop_wanted

    def stop(self) -> None:
        """Ask all ranks to stop at the end of the window."""
        self._stop_wanted = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._points.append((dict(values), step))

    def progress(self, **fields: Any) -> None:
        """Replace what the driver shows."""
        known = {name: _finite(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
        with self._lock:
            self._progress = {**(self._progress or {}), **known, "time": time.time()}

    def note(self, text: str) -> None:
        """One line that the driver shows to the user."""
        with self._lock:
            before = self._progress or {}
            notes = [*before.get("notes", ()), text][-MOST_NOTES:]
            self._progress = {**before, "notes": notes, "noted": before.get("noted", 0) + 1, "time": time.time()}

    def unsent(self) -> list[tuple[dict[str, float], int]]:
        """Points that tracking has not confirmed. A checkpoint keeps them: its steps are never logged again."""
        points = list(self._points)  # First: a point that moves on meanwhile is then seen twice, never missed.
        return [*self._handed_on, *points]

    def close(self) -> None:
        """Send what is left; gives up on tracking after 30 s."""
        self._closing.set()
        self._thread.join(timeout=FLUSH_SECONDS + 30)

    def _run(self) -> None:
        shown: dict[str, Any] | None = None
        while not self._closing.wait(self._every):
            shown = self._send_progress(shown)
            self._flush()
            self._confirm()
            try:
                wish = store.read_json(store.join(self._attempt_uri, STOP))
                self.make_way, self._stop_wanted = wish.get("again"), True
            except store.NotFound:
                pass
            except store.StoreError as error:
                log.debug("stop request could not be read: %s", error)
        self._send_progress(shown)
        deadline = time.monotonic() + FLUSH_SECONDS
        self._flush()
        while self._points and time.monotonic() < deadline:
            time.sleep(1.0)
            self._flush()
        if self._points:
            log.error("%d points of the curves are lost: tracking did not answer", len(self._points))
        try:
            self._opened.close()
        except Exception as error:  # What tracking leaves unsent it stores itself; training is done either way.
            log.warning("tracking did not close: %s", error)

    def _send_progress(self, shown: dict[str, Any] | None) -> dict[str, Any] | None:
        with self._lock:
            progress = self._progress
        if progress is shown or progress is None:
            return shown
        try:
            store.write_json(store.join(self._attempt_uri, PROGRESS), progress)
        except (store.StoreError, ValueError) as error:
            log.warning("progress could not be written: %s", error)
        return progress

    def _confirm(self) -> None:
        """Let go of the points that tracking has sent; a log without a buffer of its own has sent them all."""
        count = len(self._handed_on)
        flush = getattr(self._log, "flush", None)
        try:
            if count and (flush is None or flush()):
                for _ in range(count):
                    self._handed_on.popleft()
        except Exception as error:  # Tracking may fail in any way; training goes on.
            log.debug("tracking did not flush: %s", error)

    def _flush(self) -> None:
        """Hand every point on, in order; one that fails stays first in line and is tried again."""
        while self._points:
            try:
                if self._log is None:
                    self._log = self._opened.enter_context(self._open_log())
                self._log(*self._points[0])
            except Exception as error:  # Tracking may fail in any way; training goes on.
                if not self._warned:
                    log.warning("metrics cannot be logged, they are kept and tried again: %s", error)
                self._warned = True
                return
            self._handed_on.append(self._points[0])  # First there, then gone here: `unsent` misses none.
            self._points.popleft()
            self._warned = False


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no others."""
    return {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
