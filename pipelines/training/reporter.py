"""Metrics, progress and the wish to stop travel in a thread of rank 0: the loop never waits for a network."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pipelines import store
from pipelines.training.names import PROGRESS, STOP

__all__ = ["Log", "Reporter"]

log = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
FLUSH_SECONDS = 30.0

Log = Callable[[dict[str, float], int], None]  # values, step


class Reporter:
    """`window` from the loop; everything else in the thread. A fault of tracking never ends the training."""

    def __init__(self, attempt_uri: str, log_metrics: Callable[[], Log], every_seconds: float = EVERY_SECONDS) -> None:
        """`log_metrics` makes the function that logs; it is called in the thread, since it may import much."""
        self._attempt_uri, self._make_log, self._every = attempt_uri, log_metrics, every_seconds
        self._points: queue.SimpleQueue[tuple[dict[str, float], int]] = queue.SimpleQueue()
        self._progress: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._stop_wanted = False
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
        self._points.put((dict(values), step))

    def progress(self, **fields: Any) -> None:
        """Replace what the driver shows."""
        with self._lock:
            self._progress = {**(self._progress or {}), **fields, "time": time.time()}

    def note(self, text: str) -> None:
        """One line that the driver shows to the user."""
        with self._lock:
            before = self._progress or {}
            self._progress = {**before, "notes": [*before.get("notes", ()), text][-50:], "time": time.time()}

    def close(self) -> None:
        """Send what is left; gives up on tracking after 30 s."""
        self._closing.set()
        self._thread.join(timeout=FLUSH_SECONDS + 30)

    def _run(self) -> None:
        shown: dict[str, Any] | None = None
        while not self._closing.wait(self._every):
            shown = self._send_progress(shown)
            self._flush()
            try:
                if store.exists(store.join(self._attempt_uri, STOP)):
                    self._stop_wanted = True
            except store.StoreError as error:
                log.debug("stop request could not be read: %s", error)
        self._send_progress(shown)
        deadline = time.monotonic() + FLUSH_SECONDS
        self._flush()
        while not self._points.empty() and time.monotonic() < deadline:
            time.sleep(1.0)
            self._flush()
        if not self._points.empty():
            log.error(
                "%d points of the curves are lost: tracking did not answer for %.0f s",
                self._points.qsize(),
                FLUSH_SECONDS,
            )

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

    def _flush(self) -> None:
        """Hand every point on. Retries are the log function's own; only making it may fail here, and is tried again."""
        if self._points.empty():
            return
        try:
            if self._log is None:
                self._log = self._make_log()
        except Exception as error:  # Tracking may fail in any way; training goes on.
            if not self._warned:
                log.warning("metrics cannot be logged yet, they are kept and tried again: %s", error)
            self._warned = True
            return
        while not self._points.empty():
            values, step = self._points.get()
            self._log(values, step)
