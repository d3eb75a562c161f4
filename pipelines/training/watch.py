"""The driver's side of a running training: show its progress, ask it to stop, read what it came to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines import store
from pipelines.identity import Attempt, CannotResume
from pipelines.progress import say
from pipelines.training.names import OUTCOME, PROGRESS, STOP, TrainingError

__all__ = ["GroupLost", "MadeWay", "Outcome", "Watcher", "ask_to_make_way", "forget_round", "read_outcome", "stop"]

EVERY_SECONDS = 1.0
STOP_SECONDS = 90.0  # To finish the window under way, store a checkpoint and end the workers.


class GroupLost(TrainingError):
    """The workers ended and left no outcome: lost, not wrong."""


class MadeWay(Exception):
    """The workers have stored a checkpoint and ended, to be started again at once; says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training came to."""

    weights: str  # URI.
    step: int
    metrics: dict[str, float]
    train_seconds: float
    weights_sha256: str | None = None
    confusion: list[list[int]] | None = None
    samples: str | None = None  # URI of pictures and predictions, safetensors.
    measured_images: dict[str, int] = field(default_factory=dict)  # By split: val, test.


class Watcher:
    """Reads what rank 0 writes, and shows it."""

    def __init__(self, attempt: Attempt, update: Callable[..., None]) -> None:
        self._uri = store.join(attempt.uri, PROGRESS)
        self._update = update
        self._notes: list[str] = []
        self._dropped = 0  # Notes before the first of `_notes`, of which no more are kept.
        self._read_at = 0.0
        self.latest: dict[str, Any] = {}

    def __call__(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._read_at < EVERY_SECONDS:
            return
        self._read_at = time.monotonic()
        try:
            latest = store.read_json(self._uri)
        except store.StoreError:  # Not there yet, or the store is away for a moment: training goes on without a bar.
            return
        if latest == self.latest:
            return
        self.latest = latest
        for note in self._new_notes():
            say(note)
        metrics = {**self.latest.get("metrics", {}), **self.latest.get("validation", {})}
        if "step" in self.latest:
            self._update(
                self.latest["step"],
                images_per_second=round(metrics["images_per_second"]) if "images_per_second" in metrics else None,
                loss=metrics.get("train/loss"),
                val_top1=metrics.get("val/top1"),
            )

    def _new_notes(self) -> list[str]:
        """What has come since the last look. Workers that start again begin anew."""
        notes = list(self.latest.get("notes", ()))
        dropped = int(self.latest.get("noted", len(notes))) - len(notes)
        known = self._notes[max(0, dropped - self._dropped) :]
        goes_on = dropped >= self._dropped and notes[: len(known)] == known
        self._notes, self._dropped = notes, dropped
        return notes[len(known) :] if goes_on else notes


def stop(attempt: Attempt, ended: threading.Event, watcher: Watcher) -> None:
    """Ask rank 0 to stop; a second Ctrl-C, or too long a wait, cuts the workers off."""
    import ray

    say("stopping: the workers store a checkpoint and end (Ctrl-C again cuts them off)")
    with contextlib.suppress(KeyboardInterrupt, store.StoreError):
        store.write_json(store.join(attempt.uri, STOP), {"time": time.time()})
        ended.wait(STOP_SECONDS)
    if not ended.is_set():
        ray.shutdown()  # The workers die with their driver.
    watcher(now=True)
    step = watcher.latest.get("checkpoint")
    say(
        f"stopped; the same command resumes {f'at step {step:,}' if step else 'from the last checkpoint, or the start'}"
    )


def ask_to_make_way(attempt: Attempt, why: str) -> None:
    """Ask rank 0 for a checkpoint and an end; `read_outcome` then raises MadeWay."""
    store.write_json(store.join(attempt.uri, STOP), {"time": time.time(), "again": why})


def forget_round(attempt: Attempt) -> None:
    """What the workers that have ended left for the driver must not be taken for the word of the next."""
    for name in (OUTCOME, STOP):
        store.delete(store.join(attempt.uri, name))


def read_outcome(attempt: Attempt, failure: BaseException | None) -> Outcome:
    try:
        left = store.read_json(store.join(attempt.uri, OUTCOME))
    except store.NotFound:
        cause = getattr(failure, "controller_failure", None) or failure
        if isinstance(cause, TrainingError | CannotResume):
            raise cause from None  # Final, from a rank that got no further than its start.
        raise GroupLost(_explain(failure) if failure else "the workers ended and left no result") from failure
    if error := left.get("error"):
        raise (CannotResume if left.get("begin_anew") else TrainingError)(error)
    if again := left.get("again"):
        raise MadeWay(again)
    if left.get("stopped"):  # By a stop request that was not this driver's Ctrl-C.
        raise KeyboardInterrupt
    return Outcome(
        weights=left["weights"],
        step=left["step"],
        metrics=left["metrics"],
        train_seconds=left["train_seconds"],
        weights_sha256=left.get("weights_sha256"),
        confusion=left.get("confusion"),
        samples=left.get("samples"),
        measured_images=left.get("measured_images", {}),
    )


def _explain(failure: BaseException) -> str:
    """The worker's own error, out of Ray's wrappers."""
    failure = getattr(failure, "controller_failure", None) or failure
    if isinstance(failure, TrainingError | CannotResume):
        return str(failure)
    workers = getattr(failure, "worker_failures", None) or {}
    for rank, error in sorted(workers.items()):
        cause = getattr(error, "cause", None) or error.__cause__ or error
        return f"worker {rank}: {type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause) else ''}"
    return f"{type(failure).__name__}: {failure}"
