"""The training loop: plain PyTorch over an iterator of batches. It knows no Ray, no store, no tracking."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from pipelines.batch import Batch
from pipelines.training.config import TrainConfig
from pipelines.training.forward import Prepare
from pipelines.training.names import TrainingError
from pipelines.training.objective import Objective
from pipelines.training.parallel import Ranks
from pipelines.training.pieces import Pieces
from pipelines.training.schedules import ScheduleConfig, learning_rate
from pipelines.training.state import TrainState
from pipelines.training.step import Stepper
from pipelines.training.telemetry import Window

__all__ = ["Hooks", "LoopConfig", "NotFinite", "TrainingError", "train"]

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
    peak_flops: float | None = None  # FLOP/s of one device by its data sheet, for mfu.


class NotFinite(TrainingError):
    """The loss or the gradient of update `step` was not finite; the weights after it are spoiled."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(
            f"loss or gradient of step {step} is not finite (mean loss of its window: {loss}); lower peak_lr, lengthen"
            " the warm-up, set grad_clip, or let train.non_finite: rollback leave the step out"
        )
        self.step = step


def _nothing(*_: object) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Hooks:
    """What others do between steps. Each runs on every rank."""

    window: Callable[[int, dict[str, float]], None] = _nothing  # step, metrics
    validate: Callable[[int], bool | None] = _nothing  # step; collective; True ends the training, the same on all ranks
    after_step: Callable[[TrainState], None] = _nothing  # Checkpoints by the clock; not collective.
    save: Callable[[TrainState], None] = _nothing  # Some rank's `wants_save`; the same steps on all ranks.
    wants_stop: Callable[[], bool] = lambda: False  # Any rank's wish stops all of them at the end of the window.
    wants_save: Callable[[], bool] = lambda: False


def train(
    state: TrainState,
    batches: Iterable[Batch],
    config: LoopConfig,
    ranks: Ranks,
    prepare: Prepare,
    hooks: Hooks,
    *,
    objective: Objective | None = None,
    pieces: Pieces | None = None,
    left_out: Collection[int] = (),
) -> bool:
    """Update `state` until `total_steps`; returns False if it stopped before. Batches must begin at `state.step`.

    `left_out`: steps whose batch is read and whose update is not made. Raises NotFinite, TrainingError.
    """
    update = Stepper(state, config.train, ranks, prepare, objective, pieces, config.total_steps)
    window = Window(ranks, config.train.batch_size, config.macs_per_image, config.peak_flops)
    state.model.train()
    with _CollectionUnderControl():
        for batch in _in_order(batches, state, window):
            lr = learning_rate(config.schedule, config.peak_lr, state.step, config.total_steps)
            skip = state.step in left_out
            window.add(update(batch, config.seed, lr, skip), skip)
            last = state.step == config.total_steps
            if state.step % config.log_every_steps == 0 or last:
                closed = window.close(state.step, config.total_steps, lr, hooks.wants_stop(), hooks.wants_save())
                if closed.bad_step is not None:
                    raise NotFinite(closed.bad_step, closed.metrics["train/loss"])
                hooks.window(state.step, closed.metrics)
                if closed.stop and not last:
                    return False
                if closed.save and not last:
                    hooks.save(state)
            started = time.perf_counter()
            ended = last
            if last or (config.validate_every_steps and state.step % config.validate_every_steps == 0):
                ended = bool(hooks.validate(state.step)) or last
            hooks.after_step(state)
            window.exclude(time.perf_counter() - started)
            if state.step % COLLECT_EVERY == 0:
                gc.collect()
            if ended:
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


class _CollectionUnderControl:
    """A collection on one rank stalls every other at the next all-reduce: collect at the same steps everywhere."""

    def __enter__(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            gc.enable()
