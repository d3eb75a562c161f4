"""Speed by smaller images: progressive resolution (one size a step) and packing (each image its own size).

Both shrink the pixels on the device, to whole patches; the model interpolates its position embedding to them, and
validation sees whole images. Nothing is stored: sizes follow from the step, or from Philox(seed, epoch, sample_id).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.batch import Batch
from pipelines.training.config import PackingConfig, ProgressiveConfig, TrainConfig
from pipelines.training.forward import Prepare, in_precision

__all__ = ["draw_sizes", "forward_packed", "scaled", "shrink", "size_at", "stride_of"]

STREAM = 0x7061636B  # Half of the key: apart from every other use of the seed.
Size = tuple[int, int]


def stride_of(model: nn.Module) -> int:
    """Pixels between neighbouring patches; a ResNet of the paper halves its image five times."""
    return int(getattr(model.config, "stride", 32))


def scaled(size: Size, scale: float, stride: int) -> Size:
    """Height and width in whole patches, at least one of them and never larger than before."""
    height, width = (min(side, max(stride, round(side * scale / stride) * stride)) for side in size)
    return height, width


def size_at(config: ProgressiveConfig, step: int, total_steps: int, size: Size, stride: int) -> Size:
    """Of the images of this step: from `smallest` evenly up to whole."""
    done = min(1.0, step / max(1.0, config.until * total_steps))
    return scaled(size, config.smallest + (1.0 - config.smallest) * done, stride)


def draw_sizes(config: PackingConfig, batch: Batch, seed: int, stride: int) -> Tensor:
    """(B, 2) int64 on the CPU, which cuts by it: height and width of each image, its scale uniform from `smallest`."""
    ids = torch.as_tensor(batch.sample_ids).tolist()
    epochs = [0] * len(ids) if batch.epochs is None else batch.epochs.tolist()
    height, width = batch.images.shape[2:]
    sizes = []
    for epoch, sample_id in zip(epochs, ids, strict=True):
        counter = (0, 0, epoch, sample_id % (1 << 64))
        drawn = int(np.random.Philox(key=(seed % (1 << 64), STREAM), counter=counter).random_raw())
        scale = config.smallest + (1.0 - config.smallest) * (drawn >> 11) * 2.0**-53
        sizes.append(scaled((height, width), scale, stride))
    return torch.tensor(sizes)


def shrink(pixels: Tensor, size: Size) -> Tensor:
    """(B, C, H, W) floating point -> (B, C, *size), antialiased."""
    if tuple(pixels.shape[2:]) == size:
        return pixels
    return F.interpolate(pixels.float(), size, mode="bilinear", antialias=True).to(pixels.dtype)


def forward_packed(model: nn.Module, images: Tensor, sizes: Tensor, prepare: Prepare, config: TrainConfig) -> Tensor:
    """Logits (B, K), in the order of the images; all of them in one row of tokens without padding."""
    wanted: Sequence[Size] = [(height, width) for height, width in sizes.tolist()]
    with in_precision(images, prepare, config) as pixels:
        row: list[Tensor] = list(pixels)
        for size in set(wanted):
            members = [i for i, own in enumerate(wanted) if own == size]
            for i, image in zip(members, shrink(pixels[members], size), strict=True):
                row[i] = image
        logits: Tensor = model(row).logits
    return logits
