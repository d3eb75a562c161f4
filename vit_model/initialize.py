"""The paper's initialisation, as google-research/vision_transformer does it (Flax defaults where it names none)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vit_model.encoder import Attention, Block, Mlp
from vit_model.heads import AttentionPool, Head
from vit_model.position import sincos2d
from vit_model.stem import Bottleneck
from vit_model.vit import ViT

# A normal cut at two deviations has this deviation left; Flax divides by it so that the variance is as asked.
TRUNCATED_STD = 0.87962566103423978


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter and buffer, whatever was in it; a generator's seed decides all of them."""
    for module in model.modules():
        match module:
            case nn.LayerNorm() | nn.GroupNorm():
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            case nn.Conv2d():
                lecun_normal(module.weight, generator)
                zero(module.bias)
            case nn.Linear():  # attention output; what is special is overwritten by its owner below
                xavier(module.weight, 1, generator)
                zero(module.bias)
    for module in model.modules():
        match module:
            case Attention():
                xavier(module.qkv.weight, 3, generator)
            case Mlp():
                nn.init.normal_(module.dense1.bias, std=1e-6, generator=generator)
                nn.init.normal_(module.dense2.bias, std=1e-6, generator=generator)
            case AttentionPool():
                bound = math.sqrt(6 / (1 + module.probe.shape[2]))  # Xavier of a (1, 1, D) array
                nn.init.uniform_(module.probe, -bound, bound, generator=generator)
                xavier(module.key_value.weight, 2, generator)
            case Block() if module.layer_scale1 is not None and module.layer_scale2 is not None:
                nn.init.constant_(module.layer_scale1, layer_scale_of(model))
                nn.init.constant_(module.layer_scale2, layer_scale_of(model))
            case Bottleneck():
                nn.init.zeros_(module.norm3.weight)  # each unit starts as its shortcut
            case Head():
                initialize_head(module, generator)
            case ViT():
                initialize_tokens(module, generator)


def initialize_head(head: Head, generator: torch.Generator | None = None, bias: float = 0.0) -> None:
    """A zero last layer; for the sigmoid loss start with bias = -ln(num_classes), about -10 for ImageNet-21k."""
    with torch.no_grad():
        if head.hidden is not None:
            lecun_normal(head.hidden.weight, generator)
            nn.init.zeros_(head.hidden.bias)
        if head.out is not None:
            nn.init.zeros_(head.out.weight)
            nn.init.constant_(head.out.bias, bias)
        if head.distilled is not None:
            nn.init.zeros_(head.distilled.weight)
            nn.init.constant_(head.distilled.bias, bias)


def initialize_tokens(model: ViT, generator: torch.Generator | None) -> None:
    if model.class_token is not None:
        nn.init.zeros_(model.class_token)
    if model.registers is not None:
        nn.init.normal_(model.registers, std=0.02, generator=generator)
    if model.position_embedding is not None:
        nn.init.normal_(model.position_embedding, std=0.02, generator=generator)
    if model.config.position == "sincos2d":
        model.get_buffer("sincos").copy_(sincos2d(model.config.grid, model.config.width))


def xavier(weight: Tensor, num_projections: int, generator: torch.Generator | None) -> None:
    """Xavier uniform of each projection by itself; of the fused matrix as a whole, q, k and v come out 0.71 as wide."""
    outputs, inputs = weight.shape
    bound = math.sqrt(6 / (inputs + outputs // num_projections))
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def lecun_normal(weight: Tensor, generator: torch.Generator | None) -> None:
    std = math.sqrt(1 / weight[0].numel()) / TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def zero(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)


def layer_scale_of(model: nn.Module) -> float:
    scale = model.config.layer_scale if isinstance(model, ViT) else None
    if scale is None:
        raise ValueError("a block with a layer scale stands outside a ViT whose config gives its initial value")
    return scale
