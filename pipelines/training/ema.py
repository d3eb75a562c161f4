"""Exponential moving average of the weights (the paper's Polyak averaging), in fp32 on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipelines.training.config import EmaConfig

__all__ = ["Ema"]


class Ema:
    """`tensors` holds the average, by the names of the weights that it follows."""

    def __init__(self, weights: Mapping[str, Tensor], config: EmaConfig) -> None:
        self.config = config
        self._names = list(weights)
        self._weights = list(weights.values())
        self.tensors = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def decay(self, step: int) -> float:
        """Share of the average that stays after update `step`, counted from 1."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(list(self.tensors.values()), self._weights, 1.0 - self.decay(step))
