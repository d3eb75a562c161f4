"""Which samples every rank was given at every step of every start of the workers, and what was lost or repeated."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import store
from pipelines.batch import Batch
from pipelines.identity import Attempt
from pipelines.training.names import STARTS

__all__ = ["Counts", "Line", "Writer", "count", "read"]


@dataclass(frozen=True, slots=True)
class Line:
    """One rank's part of one step."""

    start: tuple[int, int]  # Attempt, and which start of its workers: a later one has the last word on its steps.
    step: int
    ids: tuple[int, ...]
    time: float


class Writer:
    """Appends the lines of one process to a file of its own; what a killed process has written stays."""

    def __init__(self, folder: Path, rank: int, attempt: Attempt) -> None:
        self._file = (folder / f"trace-{rank}-{time.time_ns()}.jsonl").open("a", buffering=1)
        # Rank 0 has written its own start before any rank reads a batch.
        self._start = attempt.number, len(store.read_json(store.join(attempt.uri, STARTS)))

    def __call__(self, batch: Batch) -> None:
        ids = [int(sample) for sample in batch.sample_ids]
        line = {"start": self._start, "step": batch.step, "ids": ids, "time": time.time()}
        self._file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[Line]:
    """All whole lines: the last one of a killed process may be torn."""
    lines: list[Line] = []
    for path in sorted(folder.glob("trace-*.jsonl")):
        for text in path.read_text().splitlines(keepends=True):
            if text.endswith("\n"):
                found: dict[str, Any] = json.loads(text)
                start, ids = tuple(found["start"]), tuple(found["ids"])
                lines.append(Line(start, found["step"], ids, found["time"]))
    return lines


@dataclass(frozen=True, slots=True)
class Counts:
    lost: int  # Samples that an epoch should have seen and has not.
    repeated: int  # Times that one was seen again in the same epoch.
    redone: dict[tuple[int, int], int]  # By start: steps of earlier starts that it took again.


def count(lines: Iterable[Line], samples: int, batch_size: int, total_steps: int) -> Counts:
    """Over the union of committed steps: of each step, what the last start that took it has seen.

    For orders whose epochs are whole steps: `samples` a multiple of `batch_size`, `total_steps` of whole epochs.
    """
    epoch_steps, rest = divmod(samples, batch_size)
    if rest or total_steps % epoch_steps:
        raise ValueError(f"{samples} samples in {total_steps} steps of {batch_size} are no whole epochs")
    given: dict[tuple[int, tuple[int, int]], list[int]] = {}
    starts: dict[tuple[int, int], list[int]] = {}
    for line in lines:
        given.setdefault((line.step, line.start), []).extend(line.ids)
        starts.setdefault(line.start, []).append(line.step)
    last: dict[int, tuple[int, int]] = {}
    for step, start in given:
        last[step] = max(start, last.get(step, start))
    lost = repeated = 0
    for epoch in range(total_steps // epoch_steps):
        seen: Counter[int] = Counter()
        for step in range(epoch * epoch_steps, (epoch + 1) * epoch_steps):
            seen.update(given.get((step, last[step]), ()) if step in last else ())
        lost += samples - len(seen)
        repeated += sum(times - 1 for times in seen.values())
    redone: dict[tuple[int, int], int] = {}
    furthest = 0
    for start in sorted(starts):
        redone[start] = max(0, furthest - min(starts[start]))
        furthest = max(furthest, max(starts[start]) + 1)
    return Counts(lost, repeated, redone)
