"""One rank from start to end: resume, train, validate, checkpoint, export. What it needs is handed in."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipelines import identity, store
from pipelines.batch import Batch
from pipelines.training.checkpoint import AsyncSaver, Checkpoints, Found, Loaded
from pipelines.training.config import CheckpointConfig
from pipelines.training.loop import Hooks, LoopConfig, train
from pipelines.training.names import FAULT, OUTCOME, SAMPLES, STARTS, WEIGHTS, TrainingError
from pipelines.training.parallel import Ranks
from pipelines.training.reporter import OpenLog, Reporter
from pipelines.training.state import TrainState
from pipelines.training.step import Prepare
from pipelines.training.validation import Measured, validate

__all__ = ["Session", "SessionConfig"]

log = logging.getLogger(__name__)

MOST_STARTS = 4  # In a row from the same step: what failed three times there fails again.

Batches = AbstractContextManager[Iterator[Batch]]


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    attempt: identity.Attempt
    loop: LoopConfig
    order: dict[str, Any]  # What decides which images form a step; "lanes" is taken from the checkpoint on resume.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    num_classes: int
    first_attempt: int = 1  # Checkpoints of earlier attempts are ignored (`--again`).


class Session:
    """`run` on every rank at the same time. Only rank 0 writes."""

    def __init__(
        self,
        config: SessionConfig,
        state: TrainState,
        ranks: Ranks,
        *,
        prepare: Prepare,
        training: Callable[[int, int], Batches],
        validation: Callable[[], Batches] | None,
        test: Callable[[], Batches] | None,
        open_log: OpenLog,
        export: Callable[[Path], None],
        bad_samples: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        """`training(start_step, lanes)`, `validation()`, `test()` open this rank's batches; `export` writes weights.

        `bad_samples`: this rank's count so far of each reason, the same reasons in the same order on every rank.
        """
        self.config, self.state, self.ranks = config, state, ranks
        self._prepare, self._training, self._export = prepare, training, export
        self._validation, self._test, self._bad_samples = validation, test, bad_samples
        self._checkpoints = Checkpoints(config.attempt, config.checkpoint.keep, config.first_attempt)
        self._saver = AsyncSaver(self._checkpoints, self._committed)
        self._reporter = Reporter(config.attempt.uri, open_log) if ranks.rank == 0 else None
        self._order = dict(config.order)
        self._measured: Measured | None = None  # The last: the test split's, where there is one.
        self._measured_images: dict[str, int] = {}
        self._latest: dict[str, float] = {}
        self._fatal: BaseException | None = None
        self._saved_at = time.monotonic()
        self._window_step = 0
        self._images = self._seconds = 0.0

    def run(self) -> None:
        """Until the last step, or until a stop is asked for; leaves outcome.json. Resumes by itself."""
        try:
            self._resume()
            finished = self._train()
            self._finish(finished)
        except TrainingError as error:  # The same on every rank: trying again would end the same way.
            self._write_outcome(error=str(error))
        except Exception as error:
            self._write_fault(error)
            with contextlib.suppress(Exception):  # The upload under way saves the next start some steps.
                self._saver.wait()
            raise
        finally:
            if self._reporter is not None:
                self._reporter.close()

    # Start ----------------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Rank 0 chooses the checkpoint; the step that all ranks load from it is the one truth about the step."""
        loaded = self._checkpoints.newest() if self.ranks.rank == 0 else None
        choice = (loaded.found.attempt, loaded.found.step, self._record_start(loaded)) if loaded else (0, 0, 0)
        if loaded is None and self.ranks.rank == 0:
            choice = (0, 0, self._record_start(None))
        attempt, step, starts = self.ranks.from_rank_zero(choice)
        if attempt:
            loaded = loaded or self._checkpoints.at(attempt, step)
            lanes = loaded.state["order"]["lanes"]
            engine = {name: key for name, key in self._order.items() if name == "engine"}  # Old checkpoints name none.
            if {**self._order, "lanes": lanes} != {**engine, **loaded.state["order"]}:
                raise TrainingError(f"{loaded.found.uri} was made with another order of images; use --again")
            self._order["lanes"] = lanes
            self.state.load(loaded.tensors, loaded.found.step)
            if self._reporter is not None:
                for values, at in loaded.state.get("curves", ()):
                    self._reporter.log(values, at)
            self._note(f"resumed from the checkpoint at step {step:,} (attempt {attempt})")
        if starts >= MOST_STARTS:
            raise TrainingError(
                f"training started {starts} times from step {step:,} and got no further; {self._last_fault()}"
                "; mend that and run the same command again"
            )
        if starts > 1 or (attempt == self.config.attempt.number and self.ranks.rank == 0):
            self._note(f"the workers were started again: {self._last_fault()}")
        self._window_step = self.state.step

    def _record_start(self, loaded: Loaded | None) -> int:
        """How often in a row this attempt has started from this step."""
        uri = store.join(self.config.attempt.uri, STARTS)
        step = loaded.found.step if loaded else 0
        try:
            starts = list(store.read_json(uri))
        except store.NotFound:
            starts = []
        starts.append(step)
        store.write_json(uri, starts[-100:])
        same = 0
        for earlier in reversed(starts):
            if earlier != step:
                break
            same += 1
        return same

    def _last_fault(self) -> str:
        try:
            fault = store.read_json(store.join(self.config.attempt.uri, FAULT))
        except store.NotFound:
            return "a worker was lost without a word (killed, or out of memory)"
        return f"worker {fault['rank']} failed at step {fault['step']:,}: {fault['error']}"

    def _write_fault(self, error: BaseException) -> None:
        """For the next start and for the user."""
        fault = {"rank": self.ranks.rank, "step": self.state.step, "error": f"{type(error).__name__}: {error}"[:2000]}
        with contextlib.suppress(store.StoreError):  # The fault itself is raised, here or not.
            store.write_json(store.join(self.config.attempt.uri, FAULT), fault)

    def _note(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.note(text)

    # Between ----------------------------------------------------------------------------------------------------------

    def _train(self) -> bool:
        hooks = Hooks(
            window=self._window, validate=self._validate, after_step=self._after_step, wants_stop=self._wants_stop
        )
        if self.state.step >= self.config.loop.total_steps:
            self._validate(self.state.step)
            return True
        if self._reporter is not None:
            self._reporter.progress(step=self.state.step, metrics={}, pid=os.getpid(), host=socket.gethostname())
        with self._training(self.state.step, self._order["lanes"]) as batches:
            return train(self.state, batches, self.config.loop, self.ranks, self._prepare, hooks)

    def _window(self, step: int, metrics: dict[str, float]) -> None:
        steps, self._window_step = step - self._window_step, step
        self._seconds += steps * metrics["time/step"]
        self._images += steps * self.config.loop.train.batch_size
        metrics |= self._bad_by_reason()
        self._latest.update(metrics)
        if self._reporter is not None:
            self._reporter.log({key: value for key, value in metrics.items() if key != "eta_seconds"}, step)
            self._reporter.progress(step=step, metrics=metrics)

    def _bad_by_reason(self) -> dict[str, float]:
        """Bad samples since this start, summed over ranks. Collective."""
        if self._bad_samples is None:
            return {}
        counts = self._bad_samples()
        total = self.ranks.sum(torch.tensor(list(counts.values()), dtype=torch.float64, device=self.ranks.device))
        return {f"data/bad/{reason}": count for reason, count in zip(counts, total.tolist(), strict=True) if count}

    def _validate(self, step: int) -> None:
        last = step >= self.config.loop.total_steps
        if self._validation is not None:
            self._measure("val", self._validation, step, last)
        if self._test is not None and last:
            self._measure("test", self._test, step, last)

    def _measure(self, name: str, held_out: Callable[[], Batches], step: int, last: bool) -> None:
        started = time.perf_counter()
        with held_out() as batches:
            self._measured = validate(
                self.state.model,
                batches,
                self.config.loop.train,
                self._prepare,
                self.ranks,
                self.config.num_classes,
                keep_samples=last and self.ranks.rank == 0,
            )
        metrics = self._measured.metrics(name)
        metrics[f"time/{name}"] = time.perf_counter() - started
        self._latest.update(metrics)
        self._measured_images[name] = self._measured.images
        if self._reporter is not None:
            self._reporter.log(metrics, step)
            self._reporter.progress(step=step, validation=metrics)

    def _wants_stop(self) -> bool:
        return self._reporter is not None and (self._reporter.stop_wanted or self._fatal is not None)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def _after_step(self, state: TrainState) -> None:
        if self.ranks.rank != 0:
            return
        try:
            self._saver.poll()
        except store.StoreError as error:
            log.warning("checkpoint failed, the next one is tried at its time: %s", error)
            self._note(f"a checkpoint could not be stored: {error}")
        except identity.LeaseLost as error:
            self._fatal = error
        every = self.config.checkpoint.every_steps
        by_step = every is not None and state.step % every == 0
        by_clock = time.monotonic() - self._saved_at >= self.config.checkpoint.every_seconds and not self._saver.busy
        if (by_step or by_clock) and state.step < self.config.loop.total_steps and self._fatal is None:
            started = time.perf_counter()
            self._save()
            self._latest["time/checkpoint"] = time.perf_counter() - started
            if self._reporter is not None:
                self._reporter.log({"time/checkpoint": self._latest["time/checkpoint"]}, state.step)

    def _save(self) -> None:
        self._saver.save(
            self.state.step,
            self.state.tensors(),
            {
                "order": self._order,
                "world_size": self.ranks.world_size,
                "layout": {"kind": "replicated", "files": 1},
                "curves": self._reporter.unsent() if self._reporter is not None else [],
                "images_seen": self.state.step * self.config.loop.train.batch_size,
                "code": identity.code_fingerprint(),
            },
        )
        self._saved_at = time.monotonic()

    def _committed(self, found: Found) -> None:
        if self._reporter is not None:
            self._reporter.progress(checkpoint=found.step)

    # End ------------------------------------------------------------------------------------------------------------

    def _finish(self, finished: bool) -> None:
        if self.ranks.rank != 0:
            return
        if self._fatal is not None:
            self._write_outcome(error=str(self._fatal))
            return
        self._save()
        self._saver.wait()
        if not finished:
            self._write_outcome(stopped=True)
            return
        attempt = self.config.attempt
        outcome: dict[str, Any] = {"weights": store.join(attempt.uri, WEIGHTS)}
        with tempfile.TemporaryDirectory(prefix="vit-export-") as folder:
            path = Path(folder) / WEIGHTS
            self._export(path)
            attempt.check()
            store.upload(path, outcome["weights"])
            if self._measured is not None and self._measured.samples:
                from safetensors.torch import save_file

                save_file(
                    {name: tensor.contiguous() for name, tensor in self._measured.samples.items()},
                    Path(folder) / SAMPLES,
                )
                outcome["samples"] = store.join(attempt.uri, SAMPLES)
                store.upload(Path(folder) / SAMPLES, outcome["samples"])
        if self._measured is not None:
            outcome["confusion"] = self._measured.confusion
            outcome["measured_images"] = self._measured_images
        self._write_outcome(**outcome)

    def _write_outcome(self, **fields: Any) -> None:
        if self.ranks.rank != 0:
            return
        metrics = {key: value for key, value in self._latest.items() if key not in {"eta_seconds", "lr"}}
        if self._seconds:
            metrics["images_per_second"] = self._images / self._seconds
        outcome = {"step": self.state.step, "metrics": metrics, "train_seconds": self._seconds, **fields}
        store.write_json(store.join(self.config.attempt.uri, OUTCOME), outcome)
