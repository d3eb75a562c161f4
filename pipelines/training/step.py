"""One update, and one measurement. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from pipelines.training.config import TrainConfig
from pipelines.training.losses import loss_sum
from pipelines.training.optimizers import set_lr
from pipelines.training.parallel import GradientSum
from pipelines.training.state import TrainState

__all__ = ["Counts", "Prepare", "count_correct", "forward", "train_step"]

Prepare = Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) on the device -> float, normalised as the input spec says


@dataclass(slots=True)
class Counts:
    """Sums over samples of one rank, on the device."""

    loss: Tensor
    correct: Tensor
    images: Tensor  # Sum of weights: a bad sample counts nothing.
    grad_norm: Tensor | None = None

    def stacked(self) -> Tensor:
        return torch.stack([self.loss, self.correct, self.images]).double()


def forward(model: nn.Module, images: Tensor, prepare: Prepare, config: TrainConfig) -> Tensor:
    """Logits (B, K) of uint8 images on the device."""
    context: AbstractContextManager[object] = nullcontext()
    if config.precision == "bf16":
        context = torch.autocast(images.device.type, dtype=torch.bfloat16)
    with context:
        # tokens=False: the last block then computes only what the head reads.
        logits: Tensor = model(prepare(images), tokens=False).logits
    return logits


def count_correct(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted number of right answers; with multi-hot labels the best class must be one of them."""
    best = logits.argmax(dim=1)
    right = best == labels if labels.ndim == 1 else labels.gather(1, best[:, None])[:, 0] > 0
    return (right * weights).sum()


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, weights; the copies run beside the computation where memory is pinned."""
    images, labels, weights = (torch.as_tensor(part) for part in (batch.images, batch.labels, batch.weights))
    return tuple(part.to(device, non_blocking=True) for part in (images, labels, weights))  # type: ignore[return-value]


def train_step(
    state: TrainState, batch: Batch, gradients: GradientSum, config: TrainConfig, prepare: Prepare, lr: float
) -> Counts:
    """Forward, backward, sum over ranks, clip, update. `batch` is this rank's part of the global batch."""
    images, labels, weights = to_device(batch, gradients.flat.device)
    gradients.zero()
    logits = forward(state.model, images, prepare, config)
    loss = loss_sum(logits, labels, weights, config.loss, config.label_smoothing)
    torch.autograd.backward(loss / config.batch_size)
    gradients.finish()
    norm = gradients.clip(config.grad_clip)
    set_lr(state.optimizers, lr)
    for optimizer in state.optimizers:
        optimizer.step()
    state.step += 1
    with torch.no_grad():
        correct = count_correct(logits, labels, weights)
    return Counts(loss.detach(), correct, weights.sum(), norm)
