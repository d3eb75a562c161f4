"""What names a stage run, who may run it, and when it is finished.

A digest of what decides the result names the run. Its place is RUNS/STAGE/DIGEST/:
    lease.json      who runs it now (conditional PUT); renewed by a thread, taken over when the holder is dead
    attempts/N/     what attempt N writes
    result.json     written last: the commit point
The same command returns a finished result, resumes an unfinished one, or names the process that is at it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines import config, store
from pipelines.lease import LEASE_SECONDS, Held, Lease, LeaseLost, holder, is_held, lease, read_lease, read_token
from pipelines.progress import say
from pipelines.results import (
    StageResult,
    commit_record,
    etag_of_result,
    find_result,
    from_record,
    missing_object,
    read_record,
    result_of,
    runs,
)

__all__ = [
    "AGAIN",
    "AGAIN_OF",
    "LEASE_SECONDS",
    "PLAN_ONLY",
    "Attempt",
    "CannotResume",
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
    "missing_object",
    "result_of",
    "reusable",
    "run_stage",
    "runs",
]

AGAIN: contextvars.ContextVar[bool] = contextvars.ContextVar("AGAIN", default=False)  # Set by `--again`: recompute.
PLAN_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("PLAN_ONLY", default=False)  # Set by `vit why`.
# Names the `--again` of a whole workflow: what that has finished is not computed a second time when it is resumed.
AGAIN_OF: contextvars.ContextVar[str | None] = contextvars.ContextVar("AGAIN_OF", default=None)


class CannotResume(RuntimeError):
    """What earlier attempts left cannot be gone on from; only `--again` gets further, and begins anew."""


class Planned(Exception):
    """Raised by run_stage instead of doing the work while PLAN_ONLY is set: names the run that would be done."""

    def __init__(
        self,
        stage: str,
        digest: str,
        identity: dict[str, Any],
        missing: Callable[[StageResult], str | None] = lambda result: None,
    ) -> None:
        super().__init__(f"{stage} {digest[:12]}")
        self.stage, self.digest, self.identity, self.missing = stage, digest, identity, missing


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
            if "in_order" in spec.metadata:
                chosen[spec.name] = config.with_order(chosen[spec.name], spec.metadata["in_order"])
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


# A stage run --------------------------------------------------------------------------------------------------------


def holder_of(stage: str, digest: str) -> str | None:
    """The live process that is at this run, or None."""
    try:
        record = read_lease(store.join(runs(), stage, digest, "lease.json"))
    except store.NotFound:
        return None
    return holder(record) if is_held(record) else None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a stage run. Picklable: a worker process may hold it and check the lease before it commits."""

    stage: str
    digest: str
    number: int
    root: str  # RUNS/STAGE/DIGEST
    token: str
    first: int = 1  # What attempts before this one left does not count: `--again` began here.

    @property
    def name(self) -> str:
        """Ray run name and submission id: a finished submission id cannot be used again, hence the attempt number."""
        return f"{self.stage}-{self.digest[:12]}-a{self.number}"

    @property
    def uri(self) -> str:
        return store.join(self.root, "attempts", str(self.number))

    def check(self) -> None:
        """Raise LeaseLost if another attempt took over. Call it before every commit."""
        if read_token(store.join(self.root, "lease.json")) != self.token:
            raise LeaseLost(f"{self.name}: another attempt took over; this one stops and writes nothing more")

    def result(self, *, uri: str, run_id: str | None, metrics: Mapping[str, float], **details: Any) -> StageResult:
        return StageResult(self.stage, uri, self.digest, run_id, dict(metrics), dict(details))


def run_stage(
    stage: str,
    version: int,
    recipe: Any,
    inputs: Mapping[str, str],
    work: Callable[[Attempt], StageResult],
    missing: Callable[[StageResult], str | None] = lambda result: None,
) -> StageResult:
    """Return the finished result of this identity, or do the work under its lease and commit the result.

    `inputs` maps each input field to the content digest of what it refers to. `missing` looks, cheaply, whether a
    finished result still has what it refers to, and says what is gone. Raises Held if a live process is at it.
    """
    identity = _identity(stage, version, recipe, inputs)
    digest = digest_of(stage, version, recipe, inputs)
    if PLAN_ONLY.get():
        raise Planned(stage, digest, identity, missing)
    place = store.join(runs(), stage, digest)
    label = f"{stage} {digest[:12]}"
    seen = read_record(place)
    if finished := _finished(seen, place, label, missing):
        return finished
    with lease(store.join(place, "lease.json"), label) as held:
        before, now = etag_of_result(place), read_record(place)
        if now != seen and (finished := _finished(now, place, label, missing)):  # While we waited for the lease.
            return finished
        attempt = _begin(held, stage, digest, place, now)
        held.note_sources([identity, config.to_dict(recipe)], digest)
        say(f"{label}: {_verb(attempt)}")
        started = time.time()
        with _terminate_as_interrupt(), _spoiled(held):
            result = work(attempt)
        record = {
            "schema": 1,
            "identity": identity,
            "recipe": config.to_dict(recipe),
            "result": {key: value for key, value in dataclasses.asdict(result).items() if key != "reused"},
            "code": code_fingerprint(),
            "attempt": attempt.number,
            "again": AGAIN_OF.get() if AGAIN.get() else None,
            "started": started,
            "seconds": round(time.time() - started, 3),
        }
        commit_record(place, record, before, held.check)
        say(f"{label}: finished in {record['seconds']:.1f} s -> {result.uri}")
        return result


def reusable(record: Mapping[str, Any] | None) -> bool:
    """Whether a result is returned as it is: always, but for `--again`, which takes only what it has made itself."""
    if record is None:
        return False
    return not AGAIN.get() or (AGAIN_OF.get() is not None and record.get("again") == AGAIN_OF.get())


def _finished(
    record: Mapping[str, Any] | None, place: str, label: str, missing: Callable[[StageResult], str | None]
) -> StageResult | None:
    if record is None or not reusable(record):
        return None
    result = from_record(record, place)
    if problem := missing(result):
        say(f"{label}: finished before, but {problem}; it is made again")
        return None
    made_by, here = record.get("code", "unknown"), code_fingerprint()
    same = _source(made_by) == _source(here)
    other = "" if same else f"; made by code {made_by}, this is {here}; --again recomputes"
    say(f"{label}: reused, finished before in {record.get('seconds', 0):.1f} s{other}")
    return replace(result, reused=True)


def _begin(held: Lease, stage: str, digest: str, place: str, record: Mapping[str, Any] | None) -> Attempt:
    """This attempt, and the first one whose work counts.

    `--again` begins anew once; until that is finished the same code goes on with it, whatever interrupted it. The lease
    keeps this from attempt to attempt.
    """
    first = int(held.note.get("first", 1))
    if AGAIN.get():
        here = _source(code_fingerprint())
        is_done = record is not None and int(record.get("attempt", 1)) >= first
        if is_done or held.note.get("spoiled") or held.note.get("code") != here:
            first = held.attempt
            held.annotate(first=first, code=here, spoiled=False)
    return Attempt(stage, digest, held.attempt, place, held.token, first)


def _verb(attempt: Attempt) -> str:
    if attempt.number == attempt.first:
        return f"attempt {attempt.number}" + (" (--again)" if AGAIN.get() else "")
    return f"attempt {attempt.number}, resuming" + (f" what attempt {attempt.first} began" if attempt.first > 1 else "")


@contextmanager
def _spoiled(held: Lease) -> Iterator[None]:
    """After CannotResume the next `--again` begins anew."""
    try:
        yield
    except CannotResume:
        with contextlib.suppress(store.StoreError, LeaseLost):  # The error itself is what the user must see.
            held.annotate(spoiled=True)
        raise


def _source(fingerprint: str) -> str:
    """The fingerprint without the commit: the same sources are the same code."""
    return fingerprint.split("-")[0]


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
