"""The one place that builds: config -> initialised model."""

from __future__ import annotations

import torch
from torch import nn

from vit_model.config import HeadKind, ModelConfig, ViTConfig
from vit_model.heads import Head
from vit_model.initialize import initialize, initialize_head
from vit_model.resnet import ResNet
from vit_model.vit import ViT

Model = ViT | ResNet


def build_model(
    config: ModelConfig,
    num_classes: int,
    head: HeadKind = "linear",
    *,
    head_bias: float = 0.0,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """An initialised model in training mode; num_classes=0 leaves out the head (logits are then pre_logits).

    head="mlp" is the head of pre-training, "distilled" DeiT's pair; head_bias=-ln(num_classes) suits the sigmoid loss.
    device="meta" holds no numbers. seed=None draws from torch's global generator.
    """
    model = build_empty(config, num_classes, head)
    if str(device) == "meta":
        return model
    model.to_empty(device=device)
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    initialize(model, generator)
    if head_bias:
        initialize_head(model.head, generator, head_bias)
    return model


def build_empty(config: ModelConfig, num_classes: int, head: HeadKind) -> Model:
    """On the meta device: no memory, and no time lost on PyTorch's own initialisation."""
    check_head(config, num_classes, head)
    with torch.device("meta"):
        return ViT(config, num_classes, head) if isinstance(config, ViTConfig) else ResNet(config, num_classes, head)


def replace_head(model: Model, num_classes: int, head: HeadKind = "linear", *, head_bias: float = 0.0) -> Model:
    """Drop the old head whole, both layers of an MLP head (paper B.1.1); the new one has a zero last layer."""
    check_head(model.config, num_classes, head)
    parameter = next(model.parameters())
    new = Head(model.config.width, num_classes, head).to(device=parameter.device, dtype=parameter.dtype)
    if not parameter.is_meta:
        initialize_head(new, bias=head_bias)
    model.head = new.train(model.training)
    return model


def check_head(config: ModelConfig, num_classes: int, head: HeadKind) -> None:
    if head not in ("linear", "mlp", "distilled"):
        raise ValueError(f"head={head!r} is not one of 'linear', 'mlp', 'distilled'")
    if type(num_classes) is not int or num_classes < 0:
        raise ValueError(f"num_classes={num_classes!r} is no number of classes; 0 builds a model without a head")
    if head != "distilled":
        return
    if config.kind == "resnet" or config.pool != "token" or not config.num_registers:
        raise ValueError(
            "head='distilled' reads the class token and the first register; it needs a ViT with pool='token' and"
            " num_registers=1"
        )
    if not num_classes:
        raise ValueError("head='distilled' is two classifiers; a model without classes (num_classes=0) takes 'linear'")


def count_parameters(model: nn.Module) -> int:
    """Numbers that are trained; buffers are not among them."""
    return sum(parameter.numel() for parameter in model.parameters())
