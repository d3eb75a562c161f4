"""Logits of uint8 images, in the precision of the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pipelines.training.config import TrainConfig

__all__ = ["Prepare", "forward"]

Prepare = Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) on the device -> float, normalised as the input spec says


def forward(model: nn.Module, images: Tensor, prepare: Prepare, config: TrainConfig) -> Tensor:
    """Logits (B, K) of uint8 images on the device."""
    context: AbstractContextManager[object] = nullcontext()
    pixels = prepare(images)
    if config.precision == "bf16":
        context = torch.autocast(images.device.type, dtype=torch.bfloat16)
    elif config.precision == "bf16_pure":
        pixels = pixels.bfloat16()
    with context:
        # tokens=False: the last block then computes only what the head reads.
        logits: Tensor = model(pixels, tokens=False).logits
    return logits
