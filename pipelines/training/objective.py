"""What a step minimises: the loss on the labels and on a teacher's answers, or on masked patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from pipelines.training.config import TrainConfig
from pipelines.training.distill import Teacher, teacher_loss
from pipelines.training.forward import Prepare, forward
from pipelines.training.losses import count_correct, loss_sum
from pipelines.training.masked import corruption, masked_terms
from pipelines.training.sizes import draw_sizes, forward_packed, stride_of

__all__ = ["Objective", "class_weight_tensor"]


class Objective:
    """Sums over samples: divided by `batch_size`, the parts of a batch add up to the same however it is cut."""

    def __init__(
        self, config: TrainConfig, class_weights: Tensor | None = None, teacher: Teacher | None = None
    ) -> None:
        self.config, self.class_weights, self.teacher = config, class_weights, teacher

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor, answers: Tensor | None) -> Tensor:
        """`answers`: the teacher's logits (B, K), None without a teacher."""
        kind, share = self.config.loss, self.teacher.config.weight if self.teacher is not None else 0.0
        loss = logits.new_zeros((), dtype=torch.float32)
        if share < 1:
            loss = loss_sum(logits, labels, weights, kind, self.config.label_smoothing, self.class_weights)
        if self.teacher is None or answers is None:
            return loss
        return (1.0 - share) * loss + share * teacher_loss(logits, answers, weights, kind, self.teacher.config)

    def answers(self, images: Tensor) -> Tensor | None:
        return None if self.teacher is None else self.teacher.logits(images, self.config)

    def plan(self, model: nn.Module, batch: Batch, seed: int, device: torch.device) -> Tensor | None:
        """What is drawn for each image of the batch before its pixels are seen; (B, ...) or None."""
        if self.config.packing is not None:
            return draw_sizes(self.config.packing, batch, seed, stride_of(model))
        return corruption(model, batch, self.config.masked, seed, device) if self.config.masked is not None else None

    def terms(
        self, model: nn.Module, images: Tensor, labels: Tensor, weights: Tensor, plan: Tensor | None, prepare: Prepare
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses, with a gradient, and of what was right; of a piece of a batch with its part of `plan`."""
        if plan is not None and self.config.masked is not None:
            return masked_terms(model, images, weights, plan, prepare, self.config)
        answers = self.answers(images)
        if plan is not None:
            logits = forward_packed(model, images, plan, prepare, self.config)
        else:
            logits = forward(model, images, prepare, self.config)
        loss = self(logits, labels, weights, answers)
        with torch.no_grad():
            return loss, count_correct(logits, labels, weights)


def class_weight_tensor(given: Mapping[str, float] | None, class_names: Sequence[str]) -> Tensor | None:
    """(K,) in the order of the classes; a class that is not named weighs 1. Raises ValueError for an unknown name."""
    if not given:
        return None
    if unknown := sorted(given.keys() - set(class_names)):
        raise ValueError(
            f"class_weights names {', '.join(unknown)}, which the corpus has not; it has"
            f" {', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}"
        )
    return torch.tensor([given.get(name, 1.0) for name in class_names])
