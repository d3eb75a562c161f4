"""Logits of uint8 images, in the precision of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from pipelines.training.config import TrainConfig

__all__ = ["Prepare", "forward", "in_precision"]

Prepare = Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) on the device -> float, normalised as the input spec says


@contextmanager
def in_precision(images: Tensor, prepare: Prepare, config: TrainConfig) -> Iterator[Tensor]:
    """What the model takes of uint8 images on the device, and the context it computes in."""
    context: AbstractContextManager[object] = nullcontext()
    pixels = prepare(images)
    if config.precision == "bf16":
        context = torch.autocast(images.device.type, dtype=torch.bfloat16)
    elif config.precision == "bf16_pure":
        pixels = pixels.bfloat16()
    with context:
        yield pixels


def forward(model: nn.Module, images: Tensor, prepare: Prepare, config: TrainConfig) -> Tensor:
    """Logits (B, K) of uint8 images on the device."""
    with in_precision(images, prepare, config) as pixels:
        # tokens=False: the last block then computes only what the head reads.
        logits: Tensor = model(pixels, tokens=False).logits
    return logits
