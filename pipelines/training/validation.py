"""Loss and accuracy on a held-out split, exact: every sample once, summed over ranks, padding counts nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from pipelines.training.config import TrainConfig
from pipelines.training.forward import Prepare, forward
from pipelines.training.losses import loss_sum
from pipelines.training.parallel import Ranks
from pipelines.training.step import count_correct, to_device

__all__ = ["Measured", "validate"]

SAMPLES = 24  # Pictures kept for the sample page.


@dataclass(slots=True)
class Measured:
    """Result of one pass over a split, the same on every rank."""

    top1: float
    loss: float
    images: int
    confusion: list[list[int]] | None = None  # [label][prediction]; single labels only.
    samples: dict[str, Tensor] = field(default_factory=dict)  # This rank's first images with their predictions.

    def metrics(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}/top1": self.top1, f"{prefix}/loss": self.loss}


@torch.inference_mode()
def validate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    prepare: Prepare,
    ranks: Ranks,
    num_classes: int,
    keep_samples: bool = False,
) -> Measured:
    """Run the model in eval mode over this rank's part of a split. A collective at its end, none before."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=ranks.device)
    samples: dict[str, list[Tensor]] = {"images": [], "labels": [], "probabilities": []}
    single_label = True
    for batch in batches:
        images, labels, weights = to_device(batch, ranks.device)
        logits = forward(model, images, prepare, config).float()
        loss = loss_sum(logits, labels, weights, config.loss)
        sums += torch.stack([loss, count_correct(logits, labels, weights), weights.sum()]).double()
        single_label = labels.ndim == 1
        if single_label:
            pairs = labels * num_classes + logits.argmax(dim=1)
            confusion += torch.bincount(pairs[weights > 0], minlength=num_classes * num_classes)
        if keep_samples and sum(len(part) for part in samples["labels"]) < SAMPLES:
            chance = logits.softmax(1) if config.loss == "softmax" else logits.sigmoid()
            for name, part in (("images", images), ("labels", labels), ("probabilities", chance)):
                samples[name].append(part[weights > 0][:SAMPLES].cpu())
    model.train(was_training)
    ranks.sum(sums)
    ranks.sum(confusion)
    loss_total, correct, count = sums.tolist()
    if not count:
        raise ValueError("the validation split has no readable sample; choose another split or set split: null")
    return Measured(
        top1=correct / count,
        loss=loss_total / count,
        images=round(count),
        confusion=confusion.view(num_classes, num_classes).tolist() if single_label else None,
        samples={name: torch.cat(parts)[:SAMPLES] for name, parts in samples.items() if parts},
    )
