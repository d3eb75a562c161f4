"""MACs of a training image, in the mean over a run: what options that see less of an image leave of them."""

from __future__ import annotations

from statistics import mean

from pipelines.training import masked
from pipelines.training.config import TrainConfig
from pipelines.training.sizes import scaled, size_at
from vit_model import ModelConfig, ViTConfig, forward_macs
from vit_model.config import HeadKind

__all__ = ["macs_per_image"]

POINTS = 100  # Over the run, or over the scales.


def macs_per_image(model: ModelConfig, num_classes: int, head: HeadKind, train: TrainConfig) -> int:
    """Of a forward pass. Patch dropout counts as an image of about as many patches as are kept."""
    if train.masked is not None:
        return masked.macs(model, train.masked)
    share = model.patch_dropout if isinstance(model, ViTConfig) else 0.0
    stride, whole = getattr(model, "stride", 32), model.size
    sizes = [whole]
    if train.progressive is not None:
        sizes = [size_at(train.progressive, step, POINTS, whole, stride) for step in range(POINTS)]
    elif train.packing is not None:
        smallest = train.packing.smallest
        sizes = [scaled(whole, smallest + (1 - smallest) * (i + 0.5) / POINTS, stride) for i in range(POINTS)]
    if isinstance(model, ViTConfig) and share:
        rows = [max(1, round(height / stride * (1 - share))) for height, _ in sizes]
        sizes = [(row * stride, width) for row, (_, width) in zip(rows, sizes, strict=True)]
    return round(mean(forward_macs(model, num_classes, head, size) for size in sizes))
