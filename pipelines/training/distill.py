"""Distillation: the teacher sees the pixels of the student, augmentation and all (arXiv 2106.05237), and whole images.

Where the student sees smaller ones (packing, progressive resolution) the teacher still sees all of each image.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.training.config import DistillConfig, TrainConfig
from pipelines.training.forward import Prepare, forward

__all__ = ["Teacher", "match_classes", "teacher_loss"]


class Teacher:
    """A frozen model with its own preparation of pixels and its own order of classes."""

    def __init__(self, model: nn.Module, config: DistillConfig, prepare: Prepare, columns: Tensor | None) -> None:
        """`columns`: for each class of the student its column in the teacher's logits; None: they are the same."""
        self.model = model.eval().requires_grad_(False)
        self.config, self._prepare, self._columns = config, prepare, columns

    @torch.no_grad()
    def logits(self, images: Tensor, train: TrainConfig) -> Tensor:
        """(B, K) in the student's order, of uint8 images on the device; nothing is kept for a backward pass."""
        logits = forward(self.model, images, self._prepare, train)
        return logits if self._columns is None else logits[:, self._columns]


def match_classes(student: tuple[str, ...], teacher: tuple[str, ...]) -> list[int] | None:
    """For each class of the student its place in the teacher's; None if they are the same. Raises ValueError."""
    if student == teacher:
        return None
    places = {name: place for place, name in enumerate(teacher)}
    if missing := [name for name in student if name not in places]:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"the teacher does not know {len(missing)} of {len(student)} classes ({shown});"
            " take a teacher that was trained on these classes"
        )
    return [places[name] for name in student]


def teacher_loss(
    logits: Tensor, answers: Tensor, weights: Tensor, kind: Literal["softmax", "sigmoid"], config: DistillConfig
) -> Tensor:
    """Weighted sum over samples of the distance to the teacher's answers. `logits`, `answers`: (B, K)."""
    logits, answers = logits.float(), answers.float()
    if config.target == "hard":
        best = answers.argmax(dim=1)
        if kind == "softmax":
            each = F.cross_entropy(logits, best, reduction="none")
        else:
            hot = F.one_hot(best, answers.shape[1]).float()
            each = F.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(dim=1)
        return torch.sum(each * weights)
    cold = 1.0 / config.temperature
    if kind == "softmax":
        student, teacher = F.log_softmax(logits * cold, dim=1), F.log_softmax(answers * cold, dim=1)
        each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    else:
        chance = torch.sigmoid(answers * cold)
        terms = F.binary_cross_entropy_with_logits(logits * cold, chance, reduction="none")
        # Less the teacher's own entropy, so that 0 is reached where both agree, as with softmax.
        own = F.binary_cross_entropy_with_logits(answers * cold, chance, reduction="none")
        each = (terms - own).sum(dim=1)
    return torch.sum(each * weights) * config.temperature**2
