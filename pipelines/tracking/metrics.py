"""Metric points on their way to MLflow: sent in batches by a thread, kept while the server is down.

Training never waits for MLflow and never dies of it. What is unsent at the end is spooled beside the attempt, and the
next attempt sends it first.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import store
from pipelines.tracking.client import first_line, is_passing

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["SPOOL", "MetricSender"]

log = logging.getLogger(__name__)

SEND_EVERY_SECONDS = 2.0
POINTS_PER_CALL = 1000  # MLflow's limit of one log-batch call.
MOST_POINTS_KEPT = 500_000  # About 100 MB; days of training with the server down.
CLOSE_SECONDS = 20.0
SPOOL = "unsent-metrics-"
_NAME = re.compile(r"[\w.\- :/]{1,250}")

Point = tuple[str, float, int, int]  # key, value, step, timestamp in ms


class MetricSender:
    """Buffer and sending thread of one MLflow run. Thread-safe."""

    def __init__(self, client: MlflowClient, run_id: str, spool: str | None) -> None:
        self._client, self._run_id, self._spool = client, run_id, spool  # spool: a folder of the store
        self._points: deque[Point] = deque()
        self._lock = threading.Lock()
        self._sending = threading.Lock()  # One sender at a time, so that a failed batch goes back in its place.
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._said_down = False
        self.lost = 0  # Points given up: the buffer was full, or the server refused them for good.

    def add(self, values: Mapping[str, float], step: int) -> None:
        for key in values:
            if not _NAME.fullmatch(key):
                raise ValueError(
                    f"metric name {key!r}: letters, digits and _ - . : / and space only, at most 250 characters"
                )
        now = int(time.time() * 1000)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"metric {next(iter(values), '')!r} logged after the run was closed")
            self._points.extend((key, float(value), int(step), now) for key, value in values.items())
            while len(self._points) > MOST_POINTS_KEPT:
                self._points.popleft()
                self.lost += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="mlflow-metrics", daemon=True)
                self._thread.start()
            if len(self._points) >= POINTS_PER_CALL:
                self._wake.set()

    def _loop(self) -> None:
        while not self._closed:
            self._wake.wait(SEND_EVERY_SECONDS)
            self._wake.clear()
            try:
                sent = self.send()
            except Exception:
                log.exception("sending metrics to MLflow failed in a way we did not foresee; trying again")
                sent = False
            if not sent and not self._closed:
                time.sleep(SEND_EVERY_SECONDS)

    def send(self) -> bool:
        """Send all that is waiting; False when the server did not take it (it stays in the buffer)."""
        from mlflow.entities import Metric

        with self._sending:
            while True:
                with self._lock:
                    chunk = [self._points.popleft() for _ in range(min(POINTS_PER_CALL, len(self._points)))]
                if not chunk:
                    return True
                metrics = [Metric(key, value, timestamp, step) for key, value, step, timestamp in chunk]
                try:
                    self._client.log_batch(self._run_id, metrics=metrics)
                except Exception as error:
                    if is_passing(error):
                        with self._lock:
                            self._points.extendleft(reversed(chunk))
                        if not self._said_down:
                            self._said_down = True
                            log.warning("MLflow takes no metrics (%s); kept and retried", first_line(error))
                        return False
                    log.error("MLflow refused %d metric points for good: %s", len(chunk), first_line(error))
                    self.lost += len(chunk)
                else:
                    if self._said_down:
                        self._said_down = False
                        log.warning("MLflow takes metrics again")

    def close(self) -> int:
        """Stop the thread and send the rest; returns how many points could not be sent and were spooled or lost."""
        with self._lock:
            self._closed = True
        self._wake.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        while not (sent := self.send()) and time.monotonic() < deadline:
            time.sleep(1.0)
        if not sent:
            self._spool_rest()
        if self.lost:
            log.warning("%d metric points of run %s never reached MLflow", self.lost, self._run_id)
        return self.lost + len(self._points)

    def _spool_rest(self) -> None:
        points = list(self._points)
        if self._spool is None:
            self.lost += len(points)
            self._points.clear()
            return
        place = store.join(self._spool, f"{SPOOL}{uuid.uuid4().hex[:8]}.json")
        store.write(place, json.dumps({"run_id": self._run_id, "points": points}).encode())
        log.warning(
            "%d metric points could not be sent to MLflow; they are in %s and the next attempt sends them",
            len(points),
            place,
        )

    def resend(self, spooled: Any) -> int:
        """Take up the points that an earlier attempt had to leave behind."""
        points = [(str(key), float(value), int(step), int(at)) for key, value, step, at in spooled["points"]]
        with self._lock:
            self._points.extend(points)
        return len(points)
