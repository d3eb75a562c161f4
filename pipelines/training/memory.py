"""Memory of a training step, before there is a device: weights, optimizer, and what a forward pass keeps for backward.

What is kept is counted, not guessed: the model's own forward runs, one block deep and two blocks deep, and the rest
follows by depth. Not in it: the workspace of kernels and the fragmentation of the allocator.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import torch
from torch import Tensor

from pipelines.training.config import AnyOptimizer, ParallelConfig, Sgd, TrainConfig
from vit_model import ModelConfig, ResNetConfig, build_model
from vit_model.config import HeadKind

__all__ = ["activation_bytes", "optimizer_slots", "state_bytes"]


def optimizer_slots(optimizer: AnyOptimizer) -> int:
    """fp32 numbers that the optimizer keeps for each weight; for Muon, whose matrices have one, those of its AdamW."""
    return 1 if isinstance(optimizer, Sgd) else 2


def state_bytes(
    parameters: int,
    largest_block: int,
    optimizer: AnyOptimizer,
    train: TrainConfig,
    parallel: ParallelConfig,
    size: int,
) -> int:
    """Bytes of one of `size` devices for what stays from step to step, and gradients; fp32 but for bf16 copies."""
    each = 4 * (2 + optimizer_slots(optimizer)) + (4 if train.ema is not None else 0)
    if parallel.kind == "ddp":
        return parameters * (each + (2 if train.precision == "bf16_pure" else 0))
    # Two blocks are gathered at a time: one computes while the next arrives; and its gradients.
    gathered = 3 * largest_block * (4 if train.precision == "fp32" else 2)
    if not parallel.reshard:
        gathered = parameters * (4 if train.precision == "fp32" else 2)
    return parameters * each // max(1, size) + gathered


def activation_bytes(model: ModelConfig, num_classes: int, head: HeadKind, train: TrainConfig) -> int:
    """Bytes for each image that a device takes at once.

    With activation checkpointing each block keeps its input alone, and one block at a time everything.
    """
    if isinstance(model, ResNetConfig):
        return _kept(model, num_classes, head, train.precision)
    one, two = (_kept(dataclasses.replace(model, depth=depth), num_classes, head, train.precision) for depth in (1, 2))
    block = two - one
    if not train.activation_checkpointing:
        return one + block * (model.depth - 1)
    kept = round(model.num_tokens * (1 - model.patch_dropout)) * model.width
    return one + model.depth * kept * (2 if train.precision == "bf16_pure" else 4)


def _kept(model: ModelConfig, num_classes: int, head: HeadKind, precision: str) -> int:
    """Bytes that one image's forward keeps besides the parameters, with the fused attention kernel."""
    built = build_model(model, num_classes, head, device="meta").to_empty(device="cpu").train()
    for weight in built.state_dict().values():
        weight.zero_()  # What is kept does not hang on the numbers, and drawing them takes most of the time.
    # Two images: the tokens of one have the shape of the position embedding, and would be taken for it.
    pixels = torch.zeros(2, model.channels, *model.size)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    if precision == "bf16_pure":
        built, pixels = built.bfloat16(), pixels.bfloat16()
    own = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    shapes = {parameter.shape for parameter in built.parameters()}
    shapes |= {parameter.mT.shape for parameter in built.parameters() if parameter.ndim == 2}
    storages: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        # Weights that autocast has converted are kept once, however many images there are.
        if place not in own and tensor.shape not in shapes:
            storages[place] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # A freed address could come back and be counted once.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        built(pixels, tokens=False)
    return sum(storages.values()) // 2
