"""Optimizers and their decay groups.

Weight decay acts on kernels alone, as in big_vision: never on biases, norms, position embedding, class token or probe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipelines.training.config import Adam, AdamW, MuonAdamW, Sgd
from pipelines.training.muon import Muon

__all__ = ["build_optimizers", "is_block_matrix", "is_kernel", "set_lr"]


def is_kernel(name: str, parameter: torch.Tensor) -> bool:
    """Whether big_vision would call this array a kernel: the matrix or filter bank of a dense or convolution layer."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] == "weight"


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether this is a matrix between hidden layers: what Muon is made for."""
    return is_kernel(name, parameter) and parameter.ndim == 2 and name.startswith("blocks.")


def build_optimizers(model: nn.Module, config: AdamW | Adam | Sgd | MuonAdamW) -> tuple[torch.optim.Optimizer, ...]:
    """One optimizer, or two that share the parameters between them; `set_lr` sets their rate before every step."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices: dict[str, nn.Parameter] = {}
    if isinstance(config, MuonAdamW):
        matrices = {name: parameter for name, parameter in trainable.items() if is_block_matrix(name, parameter)}
        if not matrices:
            raise ValueError(
                f"optimizer kind=muon: {type(model).__name__} has no matrix inside blocks; use kind: adamw"
            )
    rest = {name: parameter for name, parameter in trainable.items() if name not in matrices}
    decay = 0.0 if isinstance(config, Adam) else config.weight_decay
    groups = _decay_groups(rest, decay)
    match config:
        case AdamW():
            built: tuple[torch.optim.Optimizer, ...] = (
                torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True),
            )
        case Adam():
            built = (torch.optim.Adam(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True),)
        case Sgd():
            built = (
                torch.optim.SGD(
                    groups, lr=config.peak_lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
                ),
            )
        case MuonAdamW():
            built = (
                Muon([{"params": list(matrices.values())}], config.peak_lr, config.momentum, decay),
                torch.optim.AdamW(groups, lr=config.adamw_lr, betas=config.betas, eps=config.eps, fused=True),
            )
    for optimizer in built:
        for group in optimizer.param_groups:
            group["lr_scale"] = group["lr"] / config.peak_lr
    return built


def _decay_groups(parameters: dict[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    kernels = [parameter for name, parameter in parameters.items() if is_kernel(name, parameter)]
    others = [parameter for name, parameter in parameters.items() if not is_kernel(name, parameter)]
    groups = [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def set_lr(optimizers: tuple[torch.optim.Optimizer, ...], lr: float) -> None:
    """`lr` is the rate on the scale of `peak_lr`; a second optimizer keeps its ratio to it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
