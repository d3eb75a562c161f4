"""Pure bf16: the model computes and stores bf16, the optimizer updates fp32 copies of it.

Against autocast the forward pass needs no casts; the fp32 copies keep updates smaller than bf16's step of 2^-8.
Checkpoints and exports hold the copies, so they fit a run of any precision.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["to_bf16"]


def to_bf16(model: nn.Module) -> dict[str, nn.Parameter]:
    """Convert the model in place, buffers too; returns fp32 copies of its trainable parameters, by name."""
    masters = {
        name: nn.Parameter(parameter.detach().float().clone())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.to(torch.bfloat16)
    return masters
