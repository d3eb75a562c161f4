"""One update, and one measurement. Nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.training.config import TrainConfig
from pipelines.training.forward import Prepare
from pipelines.training.objective import Objective
from pipelines.training.optimizers import set_lr
from pipelines.training.parallel import Gradients, GradientSum, Ranks, seed_step
from pipelines.training.pieces import Pieces, is_out_of_memory
from pipelines.training.sizes import shrink, size_at, stride_of
from pipelines.training.state import TrainState

__all__ = ["Counts", "Stepper", "gradients_of", "to_device"]


@dataclass(slots=True)
class Counts:
    """Sums over samples of one rank, on the device."""

    loss: Tensor
    correct: Tensor
    images: Tensor  # Sum of weights: a bad sample counts nothing.
    grad_norm: Tensor | None = None

    def stacked(self) -> Tensor:
        return torch.stack([self.loss, self.correct, self.images]).double()


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, weights; the copies run beside the computation where memory is pinned."""
    images, labels, weights = (torch.as_tensor(part) for part in (batch.images, batch.labels, batch.weights))
    return tuple(part.to(device, non_blocking=True) for part in (images, labels, weights))  # type: ignore[return-value]


def gradients_of(state: TrainState, ranks: Ranks) -> Gradients:
    """Those that the state was built with; else every rank holds all of the model as it is."""
    if state.gradients is None:
        state.gradients = GradientSum(state.model, ranks)
    return state.gradients


class Stepper:
    """One update after the other: forward, backward, sum over ranks, clip, update, average."""

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        ranks: Ranks,
        prepare: Prepare,
        objective: Objective | None = None,
        pieces: Pieces | None = None,
        total_steps: int | None = None,
    ) -> None:
        """`total_steps`: of the run; progressive resolution needs it."""
        self.state, self.config, self.ranks, self.prepare = state, config, ranks, prepare
        self.gradients = gradients_of(state, ranks)
        self.objective = objective or Objective(config)
        self.total_steps = total_steps
        self.pieces = pieces or Pieces(config.per_device_batch_size)

    def __call__(self, batch: Batch, seed: int, lr: float, skip: bool = False) -> Counts:
        """`batch` is this rank's part of the global batch. `skip`: all but the update, for a step that is left out."""
        state = self.state
        images, labels, weights = to_device(batch, self.ranks.device)
        plan = self.objective.plan(state.model, batch, seed, self.ranks.device)
        prepare = self._preparation((images.shape[2], images.shape[3]))
        while True:
            seed_step(seed, state.step, self.ranks.rank)
            try:
                loss, correct = self._gradient(images, labels, weights, plan, prepare)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.gradients.begun:
                    raise self.pieces.too_late(len(images), error) from error
                self.pieces.halve(len(images), error.with_traceback(None))  # The traceback holds the activations.
            if images.is_cuda:
                torch.cuda.empty_cache()
        self.pieces.proven = self.gradients.overlap = True
        norm = self.gradients.clip(self.config.grad_clip)
        state.step += 1
        if not skip:
            state.grad_norm = norm
            set_lr(state.optimizers, lr)
            for optimizer in state.optimizers:
                optimizer.step()
            self.gradients.updated()
            if state.ema is not None:
                state.ema.update(state.step)
        return Counts(loss, correct, weights.sum(), norm)

    def _preparation(self, whole: tuple[int, int]) -> Prepare:
        """With progressive resolution the images of a step are as small as its number says."""
        progressive, prepare = self.config.progressive, self.prepare
        if progressive is None:
            return prepare
        assert self.total_steps is not None, "progressive resolution goes by the length of the run"
        size = size_at(progressive, self.state.step, self.total_steps, whole, stride_of(self.state.model))
        return lambda part: shrink(prepare(part), size)

    def _gradient(
        self, images: Tensor, labels: Tensor, weights: Tensor, plan: Tensor | None, prepare: Prepare
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the whole batch into `gradients`; summed loss and right answers of this rank's part."""
        self.gradients.zero()
        # Until a size has fitted once, nothing leaves this rank before its whole backward has.
        self.gradients.overlap = self.pieces.proven
        cuts = self.pieces.cut(len(images))
        losses: list[Tensor] = []
        right: list[Tensor] = []
        for cut in cuts:
            self.gradients.last_piece = cut is cuts[-1]
            loss, correct = self.objective.terms(
                self.state.model,
                images[cut],
                labels[cut],
                weights[cut],
                None if plan is None else plan[cut],
                prepare,
            )
            torch.autograd.backward(loss / self.config.batch_size)
            losses.append(loss.detach())
            right.append(correct)
        self.gradients.finish()
        if len(cuts) == 1:
            return losses[0], right[0]
        return torch.stack(losses).sum(), torch.stack(right).sum()
