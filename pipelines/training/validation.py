"""Loss and accuracy on a held-out split, exact: every sample once, summed over ranks, padding counts nothing.

With several labels an image a prediction is right when the best class is one of them, and there is no confusion matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from pipelines.training.config import TrainConfig
from pipelines.training.forward import Prepare, forward
from pipelines.training.losses import count_correct, loss_sum
from pipelines.training.masked import corruption, masked_terms
from pipelines.training.parallel import Ranks
from pipelines.training.step import to_device

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


def _in_step(batches: Iterable[Batch], ranks: Ranks) -> Iterator[Batch]:
    """As many batches on every rank as on the one that has most: the rest are one image of weight 0."""
    source = iter(batches)
    first = next(source, None)
    shape = ranks.from_rank_zero(first.images.shape[1:] if first is not None else (0, 0, 0))
    nothing = Batch(
        torch.zeros(1, *shape, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64) if first is None else torch.zeros_like(first.labels[:1]),
        torch.zeros(1),
        torch.full((1,), -1),
    )
    batch = first
    while ranks.sum(torch.tensor(float(batch is not None), device=ranks.device)):
        yield nothing if batch is None else batch
        batch = next(source, None)


def validate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    prepare: Prepare,
    ranks: Ranks,
    num_classes: int,
    keep_samples: bool = False,
    in_step: bool = False,
) -> Measured:
    """Run the model in eval mode over this rank's part of a split. A collective at its end, none before.

    `in_step`: the forward pass is a collective itself, since the weights are cut over the ranks.
    """
    # FSDP2 gathers weights into tensors that training uses again: they must not become inference tensors.
    with torch.no_grad() if in_step else torch.inference_mode():
        if config.masked is not None:
            return _validate_masked(model, _in_step(batches, ranks) if in_step else batches, config, prepare, ranks)
        return _validate(model, batches, config, prepare, ranks, num_classes, keep_samples, in_step)


def _validate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    prepare: Prepare,
    ranks: Ranks,
    num_classes: int,
    keep_samples: bool,
    in_step: bool,
) -> Measured:
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=ranks.device)
    samples: dict[str, list[Tensor]] = {"images": [], "labels": [], "probabilities": []}
    single_label = True
    for batch in _in_step(batches, ranks) if in_step else batches:
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
    ranks.sum(confusion)
    loss_total, correct, count = _summed(sums, ranks)
    return Measured(
        top1=correct / count,
        loss=loss_total / count,
        images=round(count),
        confusion=confusion.view(num_classes, num_classes).tolist() if single_label else None,
        samples={name: torch.cat(parts)[:SAMPLES] for name, parts in samples.items() if parts},
    )


def _validate_masked(
    model: nn.Module, batches: Iterable[Batch], config: TrainConfig, prepare: Prepare, ranks: Ranks
) -> Measured:
    """Loss, and as top-1 the share of corrupted patches whose colour is right."""
    assert config.masked is not None
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    for batch in batches:
        images, _, weights = to_device(batch, ranks.device)
        plan = corruption(model, batch, config.masked, 0, ranks.device)
        sums += torch.stack([*masked_terms(model, images, weights, plan, prepare, config), weights.sum()]).double()
    model.train(was_training)
    loss_total, correct, count = _summed(sums, ranks)
    return Measured(top1=correct / count, loss=loss_total / count, images=round(count))


def _summed(sums: Tensor, ranks: Ranks) -> list[float]:
    """Loss, right answers and images over all ranks."""
    found: list[float] = ranks.sum(sums).tolist()
    if not found[2]:
        raise ValueError("the validation split has no readable sample; choose another split or set split: null")
    return found
