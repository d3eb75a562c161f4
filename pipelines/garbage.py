"""`vit gc --older-than 30d [--results] [--dry-run]`: frees what nobody can want any more of the stage runs.

    spent       checkpoints and copies of inputs of finished runs: their result stands
    abandoned   everything of unfinished runs that nobody is at and nothing names, but their lease, whose attempt number
                goes on counting
    unnamed     with --results: finished runs that no model version and no other finished run names
A run is freed under its own lease, so none begins meanwhile. What has no known age stays, and so does a run whose
result cannot be read. Corpora are not touched.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import identity, store
from pipelines.config import RecipeError
from pipelines.progress import say
from pipelines.runs import Run, find

__all__ = ["Garbage", "collect", "main", "named_digests", "parse_age", "sweep"]

DIGEST = re.compile(r"[0-9a-f]{64}")
SPENT = re.compile(r"attempts/\d+/(checkpoints/|ray/|initial\.|teacher\.)")
UNITS = {"h": 3600.0, "d": 86_400.0, "w": 604_800.0}


@dataclass(frozen=True, slots=True)
class Garbage:
    """What one run would give back."""

    run: Run
    kind: str
    uris: list[str]  # In the order in which they are deleted: what makes the rest valid comes first.
    bytes: int


def parse_age(text: str) -> float:
    """Seconds of "36h", "30d", "8w"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text)
    if not found:
        raise RecipeError(f"--older-than {text!r} is no age; write hours, days or weeks, such as 36h, 30d or 8w")
    return float(found[1]) * UNITS[found[2]]


def named_digests() -> set[str]:
    """Digests of runs that some model version names, of whatever model and by whatever tag or alias."""
    from pipelines.tracking.registry import all_versions

    return {digest for version in all_versions() for value in version.tags.values() for digest in DIGEST.findall(value)}


def collect(
    found: Sequence[Run], named: Collection[str], older_than: float, results: bool, now: float | None = None
) -> Iterator[Garbage]:
    """What could go, run by run. `named`: digests that model versions name."""
    now = time.time() if now is None else now
    records: dict[str, dict[str, Any] | None] = {}
    for run in found:
        try:
            records[run.digest] = run.result()
        except store.StoreError as error:
            say(f"left alone: {error}")
    named = set(named)
    for run in found:  # What is under way names in its lease what it takes from; once abandoned it no longer counts.
        if records.get(run.digest) is None and "lease.json" in run.names:
            age = _age(run, None, now)
            if run.holder() is not None or (age is not None and age < older_than):
                named |= set(DIGEST.findall(json.dumps(store.read_json(store.join(run.place, "lease.json")))))
    for digest, record in records.items():  # A result names its inputs and what it took them from.
        named |= {other for other in DIGEST.findall(json.dumps(record)) if other != digest}
    for run in found:
        if run.digest not in records:
            continue
        age = _age(run, records[run.digest], now)
        if age is None or age < older_than or run.holder() is not None:
            continue
        objects = list(store.list_objects(run.place))
        inside = {item.uri: item.uri.removeprefix(run.place + "/") for item in objects}
        if records[run.digest] is None:
            if run.digest in named:  # Its result object was deleted, so that it is made again; its weights are in use.
                continue
            kind, chosen = "abandoned", [item for item in objects if inside[item.uri] != "lease.json"]
        elif results and run.digest not in named:
            kind, chosen = "unnamed", [item for item in objects if inside[item.uri] != "lease.json"]
        else:
            kept = json.dumps(records[run.digest])
            chosen = [item for item in objects if SPENT.match(inside[item.uri]) and item.uri not in kept]
            kind = "spent"
        if chosen:
            first = ("result.json", "manifest.json")
            order = sorted((item.uri for item in chosen), key=lambda uri: (uri.rpartition("/")[2] not in first, uri))
            yield Garbage(run, kind, order, sum(item.size for item in chosen))


def sweep(garbage: Garbage) -> None:
    """Delete it, under the lease of the run. Raises Held if somebody has begun it meanwhile."""
    run = garbage.run
    with identity.lease(store.join(run.place, "lease.json"), f"{run.stage} {run.digest[:12]}") as held:
        finished = store.exists(store.join(run.place, "result.json"))
        if finished != (garbage.kind != "abandoned"):
            return  # It has ended, or was begun anew, since it was listed.
        for uri in garbage.uris:
            store.delete(uri)
        held.check()


def main(arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> int:
    """`--older-than AGE [--results] [--dry-run]`."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    dry, results = "--dry-run" in words, "--results" in words
    words = [word for word in words if word not in ("--dry-run", "--results")]
    if len(words) != 2 or words[0] != "--older-than":
        raise RecipeError("vit gc takes `--older-than AGE [--results] [--dry-run]`; AGE is such as 36h, 30d or 8w")
    age = parse_age(words[1])
    prepare()
    total = 0
    found = find()
    unfinished = any("result.json" not in run.names for run in found)
    for garbage in collect(found, named_digests() if results or unfinished else (), age, results):
        verb = "would free" if dry else "freed"
        try:
            if not dry:
                sweep(garbage)
        except identity.Held as error:
            say(f"left alone: {error}")
            continue
        total += garbage.bytes
        run = garbage.run
        say(
            f"{verb} {garbage.bytes / 1e6:,.1f} MB in {len(garbage.uris)} objects: {run.stage} {run.digest[:12]},"
            f" {garbage.kind}"
        )
    say(f"{'would free' if dry else 'freed'} {total / 1e6:,.1f} MB in all")
    return 0


def _age(run: Run, record: dict[str, Any] | None, now: float) -> float | None:
    """Since the newest sign of life that a run has left; None if it has left no time at all."""
    times = [float(run.progress().get("time", 0.0))]  # Of a finished run too: of an `--again` that was interrupted.
    if record is not None:
        if "started" not in record:
            return None
        times.append(float(record["started"]) + float(record.get("seconds", 0)))
    if "lease.json" in run.names:
        times.append(float(store.read_json(store.join(run.place, "lease.json")).get("expires", 0.0)))
    return now - max(times) if max(times) > 0 else None
