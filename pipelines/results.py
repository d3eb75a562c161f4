"""result.json of a stage run: the commit point, and how it is found again. Places are RUNS/STAGE/DIGEST."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines import store
from pipelines.lease import LeaseLost

__all__ = [
    "StageResult",
    "commit_record",
    "etag_of_result",
    "find_result",
    "from_record",
    "missing_object",
    "read_record",
    "result_of",
    "runs",
]


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


def runs() -> str:
    return store.join(store.root(), "runs")


def find_result(stage: str, digest: str) -> StageResult | None:
    """The finished result of a run, or None."""
    place = store.join(runs(), stage, digest)
    record = read_record(place)
    return None if record is None else from_record(record, place)


def result_of(reference: str) -> StageResult:
    """The finished result that any URI below RUNS/STAGE/DIGEST/ belongs to."""
    found = re.match(r"(.*/runs/([a-z_]+)/([0-9a-f]{64}))(/|$)", reference)
    if not found:
        raise ValueError(f"{reference!r} names no stage run; a run's place reads .../runs/STAGE/DIGEST/...")
    record = read_record(found[1])
    if record is None:
        raise ValueError(f"{found[2]} run {found[3][:12]} has no result yet; run that stage to its end first")
    return from_record(record, found[1])


def missing_object(result: StageResult) -> str | None:
    """For stages whose output is one object: what to say when somebody deleted it."""
    return None if store.exists(result.uri) else f"its output {result.uri} is gone"


def read_record(place: str) -> dict[str, Any] | None:
    """The whole of result.json, or None."""
    uri = _uri(place)
    try:
        record = store.read_json(uri)
    except store.NotFound:
        return None
    if not isinstance(record, dict):
        raise store.StoreError(f"{uri} is not a result; delete it and run the same command again")
    return record


def from_record(record: Mapping[str, Any], place: str) -> StageResult:
    try:
        return StageResult(**record["result"], reused=True)
    except (KeyError, TypeError) as error:
        raise store.StoreError(
            f"{_uri(place)} is not a result ({error!r}); delete it and run the same command again"
        ) from None


def commit_record(place: str, record: Mapping[str, Any], before: str | None, check: Callable[[], None]) -> None:
    """Write result.json unless a later attempt did. `before` is its ETag from when the work began, `check` the lease's.

    Between the last look at the lease and the write another attempt may take over; the condition on the write closes
    that gap. Raises LeaseLost, StoreError.
    """
    for _ in range(10):
        check()
        try:
            store.write_json(_uri(place), record, if_match=before, if_absent=before is None)
            return
        except (store.Conflict, store.NotFound):
            before, other = _standing(place)
        if other > int(record["attempt"]):
            raise LeaseLost(
                f"{place}: attempt {other} has written its result; attempt {record['attempt']} writes nothing more"
            )
        # Else an attempt that had lost its lease wrote: this one holds it, and its result is the one that stands.
    raise store.StoreError(f"{_uri(place)} keeps changing; run the same command again")


def etag_of_result(place: str) -> str | None:
    """The state of result.json, to be handed to `commit_record` at the end."""
    return _standing(place)[0]


def _standing(place: str) -> tuple[str | None, int]:
    """ETag of result.json and the attempt that wrote it; (None, 0) when there is none."""
    for _ in range(10):
        try:
            etag = store.stat(_uri(place)).etag
            record = json.loads(store.read(_uri(place), if_match=etag))
        except store.NotFound:
            return None, 0
        except store.Conflict:
            continue
        except ValueError:
            return etag, 0  # What is no result is replaced.
        return etag, int(record.get("attempt", 1)) if isinstance(record, dict) else 0
    raise store.StoreError(f"{_uri(place)} keeps changing; run the same command again")


def _uri(place: str) -> str:
    return store.join(place, "result.json")
