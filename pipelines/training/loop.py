"""The training loop: plain PyTorch over an iterator of batches. It knows no Ray, no store, no tracking."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipelines.batch import Batch
from pipelines.training.config import TrainConfig
from pipelines.training.names import TrainingError
from pipelines.training.parallel import GradientSum, Ranks, seed_step
from pipelines.training.schedules import ScheduleConfig, learning_rate
from pipelines.training.state import TrainState
from pipelines.training.step import Prepare, train_step
from pipelines.training.telemetry import Window

__all__ = ["Hooks", "LoopConfig", "TrainingError", "train"]

COLLECT_EVERY = 1000  # Steps between collections of garbage.


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    train: TrainConfig
    schedule: ScheduleConfig
    peak_lr: float
    total_steps: int
    seed: int = 0
    log_every_steps: int = 20
    validate_every_steps: int | None = None
    macs_per_image: int = 0


def _nothing(*_: object) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Hooks:
    """What others do between steps. Each runs on every rank."""

    window: Callable[[int, dict[str, float]], None] = _nothing  # step, metrics
    validate: Callable[[int], None] = _nothing  # step; collective
    after_step: Callable[[TrainState], None] = _nothing  # Checkpoints by the clock; not collective.
    wants_stop: Callable[[], bool] = lambda: False  # Any rank's wish stops all of them at the end of the window.


def train(
    state: TrainState, batches: Iterable[Batch], config: LoopConfig, ranks: Ranks, prepare: Prepare, hooks: Hooks
) -> bool:
    """Update `state` until `total_steps`; returns False if it stopped before. Batches must begin at `state.step`."""
    gradients = GradientSum(state.model, ranks)
    window = Window(ranks, config.train.batch_size, config.macs_per_image)
    state.model.train()
    with _CollectionUnderControl():
        for batch in _in_order(batches, state, window):
            lr = learning_rate(config.schedule, config.peak_lr, state.step, config.total_steps)
            seed_step(config.seed, state.step, ranks.rank)
            window.add(train_step(state, batch, gradients, config.train, prepare, lr))
            last = state.step == config.total_steps
            if state.step % config.log_every_steps == 0 or last:
                metrics, stops = window.close(state.step, config.total_steps, lr, int(hooks.wants_stop()))
                _check_finite(metrics["train/loss"], state.step, config.log_every_steps)
                hooks.window(state.step, metrics)
                if stops and not last:
                    return False
            started = time.perf_counter()
            if last or (config.validate_every_steps and state.step % config.validate_every_steps == 0):
                hooks.validate(state.step)
            hooks.after_step(state)
            window.exclude(time.perf_counter() - started)
            if state.step % COLLECT_EVERY == 0:
                gc.collect()
            if last:
                return True
    if state.step < config.total_steps:
        raise TrainingError(
            f"the batches ended at step {state.step} of {config.total_steps}; the reader must be endless"
        )
    return True


def _in_order(batches: Iterable[Batch], state: TrainState, window: Window) -> Iterator[Batch]:
    """The batches, each asserted to be the step it is used for: one source of truth for the step."""
    if state.step < 0:
        raise TrainingError(f"step {state.step} is negative")
    source = iter(batches)
    while True:
        started = time.perf_counter()
        try:
            batch = next(source)
        except StopIteration:
            return
        window.waited(time.perf_counter() - started)
        if batch.step is not None and batch.step != state.step:
            raise TrainingError(
                f"the reader gave step {batch.step} where step {state.step} is due; resume from a checkpoint"
            )
        yield batch


def _check_finite(loss: float, step: int, window: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"loss={loss} between steps {max(0, step - window)} and {step}; it must be finite;"
            " lower peak_lr, lengthen the warm-up, or set grad_clip"
        )


class _CollectionUnderControl:
    """A collection on one rank stalls every other at the next all-reduce: collect at the same steps everywhere."""

    def __enter__(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            gc.enable()
