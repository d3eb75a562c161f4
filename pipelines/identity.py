"""What names a stage run, who may run it, and when it is finished.

A digest of what decides the result names the run. Its place is RUNS/STAGE/DIGEST/:
    lease.json      who runs it now (conditional PUT); renewed by a thread, taken over when the holder is dead
    attempts/N/     what attempt N writes
    result.json     written last: the commit point
The same command returns a finished result, resumes an unfinished one, or names the process that is at it.
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines import config, store
from pipelines.progress import say

__all__ = [
    "AGAIN",
    "LEASE_SECONDS",
    "PLAN_ONLY",
    "Attempt",
    "Held",
    "Lease",
    "LeaseLost",
    "Planned",
    "StageResult",
    "canonical",
    "code_fingerprint",
    "code_origin",
    "digest_of",
    "find_result",
    "holder_of",
    "lease",
    "result_of",
    "run_stage",
    "runs",
]

log = logging.getLogger(__name__)

AGAIN: contextvars.ContextVar[bool] = contextvars.ContextVar("AGAIN", default=False)  # Set by `--again`: recompute.
PLAN_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("PLAN_ONLY", default=False)  # Set by `vit why`.
LEASE_SECONDS = 45.0  # A holder on another host is given up after this long without a sign of life.
RENEW_SECONDS = 10.0


class Held(RuntimeError):
    """A live process holds the lease of this run. Not a failure: the work is being done."""


class LeaseLost(RuntimeError):
    """Another attempt took over; this one must write nothing more."""


class Planned(Exception):
    """Raised by run_stage instead of doing the work while PLAN_ONLY is set: names the run that would be done."""

    def __init__(self, stage: str, digest: str, identity: dict[str, Any]) -> None:
        super().__init__(f"{stage} {digest[:12]}")
        self.stage, self.digest, self.identity = stage, digest, identity


@dataclass(frozen=True, slots=True)
class StageResult:
    """What every stage returns. `uri` is what the next stage reads; `digest` names the run that made it."""

    stage: str
    uri: str
    digest: str
    run_id: str | None = None  # MLflow run.
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    reused: bool = False  # Found finished, not made by this call.


# The digest ---------------------------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """JSON in one spelling only: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def deciding_fields(recipe: Any) -> dict[str, Any]:
    """The fields that decide the result: without `how` and input fields, and without those left at their default.

    A field at its default is left out so that a new option changes no old digest; a union member keeps its `kind`.
    """
    chosen: dict[str, Any] = {}
    for spec in dataclasses.fields(recipe):
        if spec.metadata.get("how") or spec.metadata.get("input"):
            continue
        value = getattr(recipe, spec.name)
        if spec.default is not dataclasses.MISSING:
            default: Any = spec.default
        elif spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        else:
            default = dataclasses.MISSING
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = deciding_fields(value)
            if hasattr(value, "kind"):
                inner["kind"] = value.kind
                if type(value) is type(default) and inner == {**deciding_fields(default), "kind": default.kind}:
                    continue
            elif type(value) is type(default) and inner == deciding_fields(default):
                continue
            chosen[spec.name] = inner
        elif default is dataclasses.MISSING or value != default:
            chosen[spec.name] = config.to_dict(_Holder(value))["value"]
    return chosen


@dataclass(frozen=True)
class _Holder:
    value: Any


def digest_of(stage: str, version: int, recipe: Any, inputs: Mapping[str, str]) -> str:
    """sha256 over stage, version, deciding fields and the content digests of the inputs."""
    return hashlib.sha256(canonical(_identity(stage, version, recipe, inputs)).encode()).hexdigest()


def _identity(stage: str, version: int, recipe: Any, inputs: Mapping[str, str]) -> dict[str, Any]:
    return {"stage": stage, "version": version, "recipe": deciding_fields(recipe), "inputs": dict(inputs)}


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """sha256 (16 digits) over the sources of vit_model and pipelines, and the commit if there is one. Needs no git."""
    import pipelines
    import vit_model

    total = hashlib.sha256()
    for package in (pipelines, vit_model):
        folder = Path(package.__file__ or "").parent
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h")):
            total.update(path.relative_to(folder.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    commit = ""
    repository = Path(__file__).parent.parent
    if (repository / ".git").exists():
        try:
            answer = subprocess.run(
                ["git", "-C", str(repository), "rev-parse", "--short=12", "HEAD"],
                capture_output=True,
                text=True,
                timeout=5,
            )
            commit = f"-{answer.stdout.strip()}" if answer.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            commit = ""
    return total.hexdigest()[:16] + commit


def code_origin() -> str:
    """Where the running code lies, and whether Ray uploaded it for this job."""
    folder = Path(__file__).parent.parent
    kind = "uploaded by the job" if "runtime_resources" in folder.parts else "installed"
    return f"{folder} ({kind}), code {code_fingerprint()}"


def runs() -> str:
    return store.join(store.root(), "runs")


# The lease ----------------------------------------------------------------------------------------------------------


def _started(pid: int) -> float | None:
    import psutil

    try:
        return round(float(psutil.Process(pid).create_time()), 2)
    except psutil.Error:
        return None


class Lease:
    """One writer per place. Held while the block of `lease()` runs; a thread renews it."""

    def __init__(self, uri: str, what: str) -> None:
        self.uri, self.what = uri, what
        self.token = uuid.uuid4().hex
        self.attempt = 1
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
            "started": _started(pid),
            "expires": expires,
        }

    def take(self) -> None:
        """Raises Held with the holder's name while that holder lives."""
        for _ in range(20):
            try:
                info = store.stat(self.uri)
                record = store.read_json(self.uri)
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
            if record["expires"] > time.time() and not _is_dead(record):
                raise Held(f"{self.what} is held by {holder(record)}")
            self.attempt = int(record["attempt"]) + 1
            try:
                taken = self._record(expires=time.time() + LEASE_SECONDS)
                self._etag = store.write_json(self.uri, taken, if_match=info.etag)
                return
            except store.Conflict:
                continue
        raise store.StoreError(f"lease {self.uri} keeps changing hands; try again")

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
            if store.read_json(self.uri)["token"] != self.token:
                return False
        except store.StoreError:
            return False
        with self._lock:
            self._etag = info.etag
        return True

    def check(self) -> None:
        """Raise LeaseLost unless the lease object still names this holder. One small GET."""
        if self._lost is None and store.read_json(self.uri)["token"] != self.token:
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
                    log.warning("%s: the lease was not released: %s", self.what, error)
        if self._thread is not None:
            self._thread.join(timeout=5)


def _is_dead(record: Mapping[str, Any]) -> bool:
    """A holder on this host whose process is gone (or whose pid is another process now) need not be waited for."""
    return bool(record["host"] == socket.gethostname() and _started(int(record["pid"])) != record["started"])


def holder(record: Mapping[str, Any]) -> str:
    return f"process {record['pid']} on {record['host']} (attempt {record['attempt']})"


def holder_of(stage: str, digest: str) -> str | None:
    """The live process that is at this run, or None."""
    try:
        record = store.read_json(store.join(runs(), stage, digest, "lease.json"))
    except store.NotFound:
        return None
    return holder(record) if record["expires"] > time.time() and not _is_dead(record) else None


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


# A stage run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a stage run. Picklable: a worker process may hold it and check the lease before it commits."""

    stage: str
    digest: str
    number: int
    root: str  # RUNS/STAGE/DIGEST
    token: str

    @property
    def name(self) -> str:
        """Ray run name and submission id: a finished submission id cannot be used again, hence the attempt number."""
        return f"{self.stage}-{self.digest[:12]}-a{self.number}"

    @property
    def uri(self) -> str:
        return store.join(self.root, "attempts", str(self.number))

    def check(self) -> None:
        """Raise LeaseLost if another attempt took over. Call it before every commit."""
        if store.read_json(store.join(self.root, "lease.json"))["token"] != self.token:
            raise LeaseLost(f"{self.name}: another attempt took over; this one stops and writes nothing more")

    def result(self, *, uri: str, run_id: str | None, metrics: Mapping[str, float], **details: Any) -> StageResult:
        return StageResult(self.stage, uri, self.digest, run_id, dict(metrics), dict(details))


def find_result(stage: str, digest: str) -> StageResult | None:
    """The finished result of a run, or None."""
    uri = store.join(runs(), stage, digest, "result.json")
    try:
        record = store.read_json(uri)
    except store.NotFound:
        return None
    return _from_record(record, uri)


def result_of(reference: str) -> StageResult:
    """The finished result that any URI below RUNS/STAGE/DIGEST/ belongs to."""
    found = re.match(r"(.*/runs/([a-z_]+)/([0-9a-f]{64}))(/|$)", reference)
    if not found:
        raise ValueError(f"{reference!r} names no stage run; a run's place reads .../runs/STAGE/DIGEST/...")
    uri = store.join(found[1], "result.json")
    try:
        return _from_record(store.read_json(uri), uri)
    except store.NotFound:
        raise ValueError(f"{found[2]} run {found[3][:12]} has no result yet; run that stage to its end first") from None


def _from_record(record: dict[str, Any], uri: str) -> StageResult:
    try:
        return StageResult(**record["result"], reused=True)
    except (KeyError, TypeError) as error:
        raise store.StoreError(f"{uri} is not a result ({error!r}); delete it and run the same command again") from None


def run_stage(
    stage: str, version: int, recipe: Any, inputs: Mapping[str, str], work: Callable[[Attempt], StageResult]
) -> StageResult:
    """Return the finished result of this identity, or do the work under its lease and commit the result.

    `inputs` maps each input field to the content digest of what it refers to. Raises Held if a live process is at it.
    """
    identity = _identity(stage, version, recipe, inputs)
    digest = digest_of(stage, version, recipe, inputs)
    if PLAN_ONLY.get():
        raise Planned(stage, digest, identity)
    place = store.join(runs(), stage, digest)
    label = f"{stage} {digest[:12]}"
    again = AGAIN.get()
    if not again and (finished := _finished(place, label)):
        return finished
    with lease(store.join(place, "lease.json"), label) as held:
        if not again and (finished := _finished(place, label)):  # Finished while we waited for the lease.
            return finished
        attempt = Attempt(stage, digest, held.attempt, place, held.token)
        verb = (
            "again (--again)"
            if again
            else ("attempt 1" if attempt.number == 1 else f"attempt {attempt.number}, resuming")
        )
        say(f"{label}: {verb}")
        started = time.time()
        with _terminate_as_interrupt():
            result = work(attempt)
        held.check()
        record = {
            "schema": 1,
            "identity": identity,
            "recipe": config.to_dict(recipe),
            "result": {key: value for key, value in dataclasses.asdict(result).items() if key != "reused"},
            "code": code_fingerprint(),
            "attempt": attempt.number,
            "started": started,
            "seconds": round(time.time() - started, 3),
        }
        store.write_json(store.join(place, "result.json"), record)
        say(f"{label}: finished in {record['seconds']:.1f} s -> {result.uri}")
        return result


def _finished(place: str, label: str) -> StageResult | None:
    uri = store.join(place, "result.json")
    try:
        record = store.read_json(uri)
    except store.NotFound:
        return None
    result = _from_record(record, uri)
    made_by, here = record.get("code", "unknown"), code_fingerprint()
    other = (
        ""
        if made_by.split("-")[0] == here.split("-")[0]
        else f"; made by code {made_by}, this is {here}; --again recomputes"
    )
    say(f"{label}: reused, finished before in {record.get('seconds', 0):.1f} s{other}")
    return replace(result, reused=True)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler, `ray job stop`) ends a stage as Ctrl-C does, so that the lease is released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
