"""When a checkpoint is made, by whom, and which one all ranks go on from."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from pipelines import identity, store
from pipelines.training.async_saver import AsyncSaver
from pipelines.training.checkpoint import CheckpointError, Checkpoints, Found, Loaded
from pipelines.training.config import CheckpointConfig
from pipelines.training.parallel import Gradients, Ranks
from pipelines.training.reporter import Reporter
from pipelines.training.state import StateError, TrainState

__all__ = ["Saves"]

log = logging.getLogger(__name__)


class Saves:
    """Rank 0 saves alone where every rank holds everything; where weights are cut, every part is saved at one step."""

    def __init__(
        self,
        attempt: identity.Attempt,
        config: CheckpointConfig,
        state: TrainState,
        gradients: Gradients,
        ranks: Ranks,
        reporter: Reporter | None,
        about: Callable[[], dict[str, Any]],
    ) -> None:
        """`about`: what the state file of a checkpoint says besides the step."""
        self.config, self.state, self.ranks, self.reporter = config, state, ranks, reporter
        self.fatal: identity.LeaseLost | None = None  # Another attempt took over: stop, and commit nothing.
        self.token = ""  # Of this start of the group, the same on all ranks.
        self._gradients, self._about = gradients, about
        self._checkpoints = Checkpoints(attempt, config.keep, gradients.part)
        self._saver = AsyncSaver(self._checkpoints, self._committed)
        self._saved_at = time.monotonic()
        self._saved_step = -1

    @property
    def is_cut(self) -> bool:
        return self._gradients.part.count > 1

    @property
    def is_writer(self) -> bool:
        return self._gradients.part.writes and (self.is_cut or self.ranks.rank == 0)

    def load_together(self, latest: int | None = None) -> Loaded | None:
        """Rank 0 proposes, newest first; taken is the first that every rank finds whole. `latest`: none after it."""
        proposals = self._checkpoints.found() if self.ranks.rank == 0 else []
        proposals = [found for found in proposals if latest is None or found.step <= latest]
        while True:
            proposed = proposals.pop(0) if proposals else None
            attempt, step = self.ranks.from_rank_zero((proposed.attempt, proposed.step) if proposed else (0, 0))
            if not attempt:
                return None
            loaded: Loaded | None = None
            try:
                loaded = self._checkpoints.at(attempt, step)
                self.state.check(loaded.tensors, step)
            except (CheckpointError, StateError) as error:
                loaded = None
                log.warning("%s; falling back to the one before", error)
            refused = self.ranks.sum(torch.tensor(float(loaded is None), device=self.ranks.device))
            if not refused:
                return loaded
            if proposed is not None:  # Rank 0, which sweeps: a part that another rank misses is missing for all.
                self._checkpoints.refuse(proposed)

    def wanted(self) -> bool:
        """By the clock of rank 0, where the others hold a part of the checkpoint and must save the same step."""
        return self.ranks.rank == 0 and self.is_cut and self._is_due()

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.config.every_seconds and not self._saver.busy

    def after_step(self, state: TrainState) -> None:
        if not self.is_writer:
            return
        self._hear(self._saver.poll)
        every = self.config.every_steps
        # Where weights are cut, the clock may have asked for this very step.
        by_step = every is not None and state.step % every == 0 and state.step != self._saved_step
        if (by_step or (not self.is_cut and self._is_due())) and self.fatal is None:
            self.save()

    def save(self) -> None:
        """The loop pauses for the copy, and for the upload before if that has not ended. Never of spoiled weights."""
        norm = self.state.grad_norm
        if not self.is_writer or (norm is not None and not norm.isfinite()):
            return
        started = time.perf_counter()
        self._hear(self._saver.wait)
        if self.fatal is not None:
            return
        tensors = self.state.tensors()
        self._saver.save(self.state.step, tensors, self._about(), self._gradients.rows(tensors), self.token)
        self._saved_at, self._saved_step = time.monotonic(), self.state.step
        if self.reporter is not None:
            self.reporter.log({"time/checkpoint": time.perf_counter() - started}, self.state.step)

    def _hear(self, ask: Callable[[], None]) -> None:
        """What has become of the upload before: one that failed is no reason to stop, a lost lease is."""
        try:
            ask()
        except store.StoreError as error:
            log.warning("checkpoint failed, the next one is tried at its time: %s", error)
            if self.reporter is not None:
                self.reporter.note(f"a checkpoint could not be stored: {error}")
        except identity.LeaseLost as error:
            self.fatal = error

    def wait(self) -> None:
        """Until the upload under way has ended. Raises its error, but for a lost lease, which is then `fatal`."""
        try:
            self._saver.wait()
        except identity.LeaseLost as error:
            self.fatal = error

    def settle(self) -> None:
        """The same, whatever it ended with: what has come of it shows in the store."""
        with contextlib.suppress(Exception):
            self._saver.wait()

    def _committed(self, found: Found) -> None:
        if self.reporter is not None:
            self.reporter.progress(checkpoint=found.step)
