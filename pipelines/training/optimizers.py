"""Optimizers, their decay groups and the rate of each layer.

Weight decay acts on kernels alone, as in big_vision: never on biases, norms, position embedding, class token or probe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipelines.training.config import Adam, AdamW, AnyOptimizer, Lamb, MuonAdamW, ScheduleFree, Sgd
from pipelines.training.lamb import Lamb as LambOptimizer
from pipelines.training.muon import Muon
from pipelines.training.schedule_free import ON_CPU, ScheduleFreeAdamW

__all__ = ["build_optimizers", "is_block_matrix", "is_kernel", "layer_of", "set_lr", "slots_of"]

STEM = ("patch_embedding", "position_embedding", "class_token", "registers", "mask_token", "stem", "root")


def is_kernel(name: str, parameter: torch.Tensor) -> bool:
    """Whether big_vision would call this array a kernel: the matrix or filter bank of a dense or convolution layer."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] == "weight"


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether this is a matrix between hidden layers: what Muon is made for."""
    return is_kernel(name, parameter) and parameter.ndim == 2 and name.startswith("blocks.")


def layer_of(name: str, depth: int) -> int:
    """0 for what comes before the blocks, i + 1 for block i, depth + 1 for norm, pool and head (BEiT's numbering)."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if name.startswith(STEM) else depth + 1


def build_optimizers(
    model: nn.Module, config: AnyOptimizer, weights: Mapping[str, nn.Parameter] | None = None
) -> tuple[torch.optim.Optimizer, ...]:
    """One optimizer, or two that share the parameters between them; `set_lr` sets their rate before every step.

    `weights`: what is updated in place of the model's own parameters, by their names: an fp32 copy, or a rank's part.
    """
    given: Mapping[str, nn.Parameter] = dict(model.named_parameters()) if weights is None else weights
    trainable = {name: parameter for name, parameter in given.items() if parameter.requires_grad and parameter.numel()}
    matrices: dict[str, nn.Parameter] = {}
    if isinstance(config, MuonAdamW):
        matrices = {name: parameter for name, parameter in trainable.items() if is_block_matrix(name, parameter)}
        if not matrices:
            raise ValueError(
                f"optimizer kind=muon: {type(model).__name__} has no matrix inside blocks; use kind: adamw"
            )
    rest = {name: parameter for name, parameter in trainable.items() if name not in matrices}
    groups = _groups(rest, config, depth=max((layer_of(name, -1) for name in given), default=0))
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
        case Lamb():
            built = (LambOptimizer(groups, config.peak_lr, config.betas, config.eps),)
        case ScheduleFree():
            built = (ScheduleFreeAdamW(groups, config.peak_lr, config.betas, config.eps, config.weight_decay),)
        case MuonAdamW():
            built = (
                Muon(
                    [{"params": list(matrices.values())}],
                    config.peak_lr,
                    config.momentum,
                    config.weight_decay,
                    fused=[matrix for name, matrix in matrices.items() if name.endswith(".qkv.weight")],
                ),
                torch.optim.AdamW(groups, lr=config.adamw_lr, betas=config.betas, eps=config.eps, fused=True),
            )
    for optimizer in built:
        for group in optimizer.param_groups:
            group["lr_scale"] = group["lr"] / config.peak_lr
    return built


def _groups(parameters: Mapping[str, nn.Parameter], config: AnyOptimizer, depth: int) -> list[dict[str, Any]]:
    """By decay, and by layer where the layers differ in their rate. Kernels first, and layers from first to last."""
    decay = 0.0 if isinstance(config, Adam) else config.weight_decay
    layer_decay: float | None = getattr(config, "layer_decay", None)
    if layer_decay is not None and not depth:
        raise ValueError(f"layer_decay={layer_decay} needs a model of blocks; a ResNet has none: set it to null")
    made: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        kernel, layer = is_kernel(name, parameter), 0 if layer_decay is None else layer_of(name, depth)
        group = made.setdefault((not kernel, layer), {"params": [], "weight_decay": decay if kernel else 0.0})
        if layer_decay is not None:
            group["lr"] = config.peak_lr * layer_decay ** (depth + 1 - layer)
        group["params"].append(parameter)
    return [made[key] for key in sorted(made)]


def slots_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Size]:
    """What the optimizer keeps of a parameter after its first step, and in what shape.

    The fused kernels do not look: a stored slot of another shape would have them write past its end.
    """
    like, number = parameter.shape, torch.Size([])
    match optimizer:
        case ScheduleFreeAdamW():
            return {"z": like, "exp_avg_sq": like, ON_CPU: torch.Size([3])}
        case Muon():
            return {"momentum_buffer": like}
        case torch.optim.SGD():
            return {"momentum_buffer": like} if optimizer.defaults["momentum"] else {}
        case torch.optim.Adam() | LambOptimizer():  # AdamW is an Adam.
            return {"step": number, "exp_avg": like, "exp_avg_sq": like}
    raise TypeError(f"{type(optimizer).__name__}: not known what it keeps")


def set_lr(optimizers: tuple[torch.optim.Optimizer, ...], lr: float) -> None:
    """`lr` is the rate on the scale of `peak_lr`; every other rate keeps its ratio to it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
