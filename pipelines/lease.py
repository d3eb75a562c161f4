"""One writer per place: a lease object, taken by a conditional write and renewed by a thread.

A holder whose process is gone is taken over at once on the same host, and from another host after LEASE_SECONDS.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipelines import store
from pipelines.processes import is_alive, start_mark

__all__ = ["LEASE_SECONDS", "Held", "Lease", "LeaseLost", "holder", "is_held", "lease", "read_lease", "read_token"]

log = logging.getLogger(__name__)

LEASE_SECONDS = 45.0  # A holder on another host is given up after this long without a sign of life.
RENEW_SECONDS = 10.0
GIVEN_UP: set[str] = set()  # Tokens of this process whose release the store did not take: a full disk.
NO_LEASE = "{} is no lease; if no other process writes there, delete it and run the same command again"
FIELDS = frozenset({"token", "attempt", "host", "pid", "expires"})


class Held(RuntimeError):
    """A live process holds the lease of this run. Not a failure: the work is being done."""


class LeaseLost(RuntimeError):
    """Another attempt took over; this one must write nothing more."""


class Lease:
    """One writer per place. Held while the block of `lease()` runs; a thread renews it."""

    def __init__(self, uri: str, what: str) -> None:
        self.uri, self.what = uri, what
        self.token = uuid.uuid4().hex
        self.attempt = 1
        self.note: dict[str, Any] = {}  # Handed on from holder to holder; `annotate` adds to it.
        self._etag = ""
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _record(self, *, expires: float) -> dict[str, Any]:
        pid = os.getpid()
        return {
            "token": self.token,
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": pid,
            "mark": start_mark(pid),
            "expires": expires,
            "note": self.note,
        }

    def take(self) -> None:
        """Raises Held with the holder's name while that holder lives."""
        for _ in range(20):
            try:
                info = store.stat(self.uri)
                record = read_lease(self.uri)
            except store.NotFound:
                try:
                    self._etag = store.write_json(
                        self.uri, self._record(expires=time.time() + LEASE_SECONDS), if_absent=True
                    )
                    return
                except store.Conflict:
                    continue
            if record["token"] == self.token:  # Our own write, whose answer was lost.
                self._etag = info.etag
                return
            if is_held(record):
                raise Held(f"{self.what} is held by {holder(record)}")
            self.attempt = int(record["attempt"]) + 1
            self.note = dict(record.get("note", {}))
            try:
                taken = self._record(expires=time.time() + LEASE_SECONDS)
                self._etag = store.write_json(self.uri, taken, if_match=info.etag)
                return
            except store.Conflict:
                continue
        raise store.StoreError(f"lease {self.uri} keeps changing hands; try again")

    def annotate(self, **fields: Any) -> None:
        """Add to the note, at once: it must stand before the work that it is about. Raises LeaseLost, StoreError."""
        with self._lock:
            self.note = {**self.note, **fields}
        for _ in range(3):
            with self._lock:
                try:
                    renewed = self._record(expires=time.time() + LEASE_SECONDS)
                    self._etag = store.write_json(self.uri, renewed, if_match=self._etag)
                    return
                except (store.Conflict, store.NotFound):
                    pass
            if not self._still_ours():
                self._lost = "another attempt took the lease"
                break
        self.check()

    def note_sources(self, described: Any, own: str) -> None:
        """Say what other runs, named by digests anywhere in `described`, this one takes from: `vit gc` keeps them."""
        found = set(re.findall(r"[0-9a-f]{64}", json.dumps(described, default=str))) - {own}
        if found and sorted(found) != self.note.get("sources"):
            self.annotate(sources=sorted(found))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._renew, name=f"lease {self.what}", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                with self._lock:
                    if self._stop.is_set():
                        return
                    renewed = self._record(expires=time.time() + LEASE_SECONDS)
                    self._etag = store.write_json(self.uri, renewed, if_match=self._etag)
            except (store.Conflict, store.NotFound):
                if self._still_ours():
                    continue
                self._lost = "another attempt took the lease"
                log.error("%s: %s", self.what, self._lost)
                return
            except store.StoreError as error:
                # Only another holder's token ends this one: after an outage the renewal finds out which it is.
                log.warning("%s: the lease could not be renewed: %s", self.what, error)

    def _still_ours(self) -> bool:
        """True when a renewal was carried out although its answer was lost."""
        try:
            info = store.stat(self.uri)
            if read_token(self.uri) != self.token:
                return False
        except store.StoreError:
            return False
        with self._lock:
            self._etag = info.etag
        return True

    def check(self) -> None:
        """Raise LeaseLost unless the lease object still names this holder. One small GET."""
        if self._lost is None and read_token(self.uri) != self.token:
            self._lost = "another attempt took the lease"
        if self._lost is not None:
            raise LeaseLost(f"{self.what}: {self._lost}; this attempt stops and writes nothing more")

    def release(self) -> None:
        self._stop.set()
        with self._lock:
            if self._lost is None:
                try:
                    # Expired, not deleted: the attempt number must go on counting.
                    store.write_json(self.uri, self._record(expires=0.0), if_match=self._etag)
                except store.StoreError as error:
                    GIVEN_UP.add(self.token)
                    log.warning("%s: the lease was not released: %s", self.what, error)
        if self._thread is not None:
            self._thread.join(timeout=5)


def read_lease(uri: str) -> dict[str, Any]:
    """What the lease object says. Raises NotFound; StoreError if that is no lease."""
    record = store.read_json(uri)
    if not isinstance(record, dict) or not record.keys() >= FIELDS:
        raise store.StoreError(NO_LEASE.format(uri))
    return record


def read_token(uri: str) -> str:
    """Whose lease it is; raises as `read_lease` does. Its other fields are for those who would take it."""
    record = store.read_json(uri)
    if not isinstance(record, dict) or "token" not in record:
        raise store.StoreError(NO_LEASE.format(uri))
    return str(record["token"])


def is_held(record: Mapping[str, Any]) -> bool:
    """Whether the holder may still be at work."""
    return bool(record["expires"] > time.time() and record["token"] not in GIVEN_UP and not _is_dead(record))


def _is_dead(record: Mapping[str, Any]) -> bool:
    """A holder on this host whose process is gone (or whose pid is another process now) need not be waited for."""
    # `started` stands in leases that an earlier release wrote.
    mark = record["mark"] if "mark" in record else record["started"]
    return bool(record["host"] == socket.gethostname() and not is_alive(int(record["pid"]), mark))


def holder(record: Mapping[str, Any]) -> str:
    """The holder's name, for people."""
    return f"process {record['pid']} on {record['host']} (attempt {record['attempt']})"


@contextmanager
def lease(uri: str, what: str, *, wait_seconds: float = 0.0) -> Iterator[Lease]:
    """Hold the lease object `uri` for a block; `what` names it in messages. A live holder is waited for that long."""
    held = Lease(uri, what)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            held.take()
            break
        except Held:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.5)
    held.start()
    try:
        yield held
    finally:
        held.release()
