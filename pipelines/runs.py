"""`vit runs`: every stage run in the store, from the objects that the runs themselves leave. Nothing else is asked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines import store
from pipelines.config import RecipeError, flatten
from pipelines.identity import canonical, holder_of, runs
from pipelines.progress import say
from pipelines.training.names import FAULT, PROGRESS, STOP
from pipelines.workflow.stages import STAGES

__all__ = ["Run", "compare", "find", "find_one", "main", "stop", "tail"]

PLACE = re.compile(r".*/([a-z_]+)/([0-9a-f]{64})/(?:attempts/(\d+)/)?([^/]+)")
SHOWN = ("val/top1", "test/top1", "top1", "train/loss", "images_per_second")
EVERY_SECONDS = 1.0


@dataclass(slots=True)
class Run:
    """One place RUNS/STAGE/DIGEST."""

    stage: str
    digest: str
    names: set[str] = field(default_factory=set)  # Objects right below it.
    attempts: dict[int, set[str]] = field(default_factory=dict)  # Objects right below each attempt.

    @property
    def place(self) -> str:
        return store.join(runs(), self.stage, self.digest)

    @property
    def attempt(self) -> str:
        """Of the newest attempt that has left anything."""
        return store.join(self.place, "attempts", str(max(self.attempts, default=1)))

    def result(self) -> dict[str, Any] | None:
        """None: it has none yet. Raises StoreError if what lies there is no result."""
        if "result.json" not in self.names:
            return None
        uri = store.join(self.place, "result.json")
        record = store.read_json(uri)
        if not _is_result(record):
            raise store.StoreError(f"{uri} is no result; delete it and run the same command again")
        return dict(record)

    def progress(self) -> dict[str, Any]:
        try:
            return dict(store.read_json(store.join(self.attempt, PROGRESS)))
        except store.NotFound:
            return {}

    def holder(self) -> str | None:
        return holder_of(self.stage, self.digest)


def find(stage: str | None = None) -> list[Run]:
    """All runs, or those of one stage; in the order of the flow, then by digest."""
    found: dict[tuple[str, str], Run] = {}
    for item in store.list_objects(runs() if stage is None else store.join(runs(), stage)):
        if not (match := PLACE.match(item.uri)):
            continue
        run = found.setdefault((match[1], match[2]), Run(match[1], match[2]))
        if match[3]:
            run.attempts.setdefault(int(match[3]), set()).add(match[4])
        elif item.uri == store.join(run.place, match[4]):
            run.names.add(match[4])
    order = {name: place for place, name in enumerate(STAGES)}
    return sorted(found.values(), key=lambda run: (order.get(run.stage, len(order)), run.digest))


def find_one(prefix: str) -> Run:
    """The run whose digest begins so; RecipeError if there is none, or more than one."""
    # "0123", "pretrain-0123456789ab-a2" as logs name a run, or the end of its place.
    wanted = re.fullmatch(r"(?:[a-z]+-)?([0-9a-f]{4,64})(?:-a\d+(?:-r\d+)?)?", prefix.rpartition("/")[2])
    fitting = [run for run in find() if run.digest.startswith(wanted[1])] if wanted else []
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise RecipeError(f"no run begins with {prefix!r}; give 4 digits or more of a digest, as `vit runs` lists them")
    names = ", ".join(f"{run.stage} {run.digest[:12]}" for run in fitting)
    raise RecipeError(f"{prefix!r} fits {names}; give more digits")


def lines(found: Sequence[Run], now: float | None = None) -> Iterator[str]:
    """One line a run: what it is, where it stands, what it came to."""
    now = time.time() if now is None else now
    width = max((len(run.stage) for run in found), default=0)
    for run in found:
        head = f"{run.stage:<{width}}  {run.digest[:12]}"
        try:
            record = run.result()
        except store.StoreError as error:
            yield f"{head}  damaged     {error}"
            continue
        if record:
            made = f"{_ago(now - float(record.get('started', now)))} ago, {float(record.get('seconds', 0)):.0f} s"
            yield f"{head}  finished    {made}  {_shown(record['result'].get('metrics', {}))}".rstrip()
            continue
        progress, holder = run.progress(), run.holder()
        step = f"step {progress['step']:,}  " if "step" in progress else ""
        metrics = _shown({**progress.get("metrics", {}), **progress.get("validation", {})})
        if holder is not None:
            yield f"{head}  running     {step}{metrics}  {holder}".rstrip()
        else:
            fault = _fault(run)
            yield f"{head}  unfinished  {step}{metrics}{f'  {fault}' if fault else ''}".rstrip()


def tail(run: Run, follow: Callable[[], None] = lambda: time.sleep(EVERY_SECONDS)) -> Iterator[str]:
    """Notes and figures as they come, until the run ends."""
    seen, last = 0, None
    while True:
        progress = run.progress()
        notes = progress.get("notes", ())
        noted = int(progress.get("noted", len(notes)))  # The oldest are not kept.
        yield from notes[max(0, len(notes) - (noted - seen)) :] if noted >= seen else notes
        seen = noted
        if progress.get("step") != last and "step" in progress:
            last = progress["step"]
            yield f"step {last:,}  {_shown({**progress.get('metrics', {}), **progress.get('validation', {})})}".rstrip()
        if store.exists(store.join(run.place, "result.json")):
            yield f"{run.stage} {run.digest[:12]} is finished"
            return
        if run.holder() is None:
            yield f"{run.stage} {run.digest[:12]}: nobody is at it; the same command resumes"
            return
        follow()
        run = find_one(run.digest)  # A new attempt may have begun.


def stop(run: Run) -> str:
    """Ask a running training to store a checkpoint and end, as Ctrl-C does."""
    holder = run.holder()
    if holder is None:
        raise RecipeError(f"{run.stage} {run.digest[:12]} is not running; there is nothing to stop")
    if not any(PROGRESS in names for names in run.attempts.values()):
        raise RecipeError(f"{run.stage} {run.digest[:12]} is no training, or has not begun: interrupt {holder}")
    store.write_json(store.join(run.attempt, STOP), {"time": time.time()})
    return f"{run.stage} {run.digest[:12]} is asked to stop ({holder}); the same command resumes it"


def compare(first: Run, second: Run) -> Iterator[str]:
    """The recipe fields that differ, then every figure that both have."""
    records = [run.result() for run in (first, second)]
    for run, record in zip((first, second), records, strict=True):
        if record is None:
            raise RecipeError(f"{run.stage} {run.digest[:12]} has no result yet; `vit runs` shows which have")
    recipes = [flatten(record["recipe"]) for record in records if record is not None]
    metrics = [record["result"].get("metrics", {}) for record in records if record is not None]
    rows = [
        (name, str(recipes[0].get(name, "-")), str(recipes[1].get(name, "-")), "")
        for name in sorted(recipes[0].keys() | recipes[1].keys())
        if canonical(recipes[0].get(name)) != canonical(recipes[1].get(name))
    ]
    rows += [
        (name, f"{metrics[0][name]:.5g}", f"{metrics[1][name]:.5g}", f"{metrics[1][name] - metrics[0][name]:+.4g}")
        for name in sorted(metrics[0].keys() & metrics[1].keys())
    ]
    rows = [("", first.digest[:12], second.digest[:12], ""), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        yield "  ".join([*(f"{text:<{width}}" for text, width in zip(row, widths, strict=False)), row[3]]).rstrip()


def main(arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> int:
    """`[list [STAGE]] | tail DIGEST | stop DIGEST | compare DIGEST DIGEST`."""
    verb, *rest = arguments or ["list"]
    if verb in STAGES:
        verb, rest = "list", [verb, *rest]
    count = {"list": (0, 1), "tail": (1, 1), "stop": (1, 1), "compare": (2, 2)}.get(verb)
    if count is None or not count[0] <= len(rest) <= count[1]:
        raise RecipeError(f"vit runs takes {main.__doc__}")
    if verb == "list" and rest and rest[0] not in STAGES:
        raise RecipeError(f"unknown stage {rest[0]!r}; known: {', '.join(STAGES)}")
    prepare()
    if verb == "list":
        shown = list(lines(find(*rest)))
        for line in shown or ["no runs here yet"]:
            say(line)
        return 0
    if verb == "stop":
        say(stop(find_one(rest[0])))
        return 0
    chosen = [find_one(prefix) for prefix in rest]
    for line in tail(chosen[0]) if verb == "tail" else compare(*chosen):
        say(line)
    return 0


def _is_result(record: Any) -> bool:
    """Whether it has the parts that a list of runs shows; `identity.run_stage` writes no other."""
    if not isinstance(record, dict) or not isinstance(record.get("result"), dict):
        return False
    metrics = record["result"].get("metrics", {})
    times = [record[name] for name in ("started", "seconds") if name in record]
    return isinstance(metrics, dict) and all(isinstance(value, int | float) for value in [*metrics.values(), *times])


def _shown(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)


def _fault(run: Run) -> str:
    try:
        return str(store.read_json(store.join(run.attempt, FAULT))["error"]).splitlines()[0]
    except (store.NotFound, KeyError, IndexError):
        return ""


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
