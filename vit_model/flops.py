"""Accounting: multiply-accumulates of a forward pass, and training exaFLOPs on the axis of the paper's figure 5."""

from __future__ import annotations

from vit_model.config import HeadKind, ModelConfig, ResNetConfig, Resolution, ViTConfig, pair


def forward_macs(
    config: ModelConfig, num_classes: int = 1000, head: HeadKind = "linear", resolution: Resolution | None = None
) -> int:
    """MACs per image of matrix products and convolutions; norms, softmax and GELU are not counted."""
    size = config.size if resolution is None else pair(resolution)
    body = resnet_macs(config, size) if isinstance(config, ResNetConfig) else vit_macs(config, size)
    hidden = config.width**2 if head == "mlp" else 0
    return body + hidden + config.width * num_classes * (2 if head == "distilled" else 1)


def training_flops(macs: int, images: float) -> float:
    """6 FLOPs per MAC: 2 forward, 4 backward. Reproduces the exaFLOPs of table 6 of the paper within 2 %."""
    return 6.0 * macs * images


def vit_macs(config: ViTConfig, size: tuple[int, int]) -> int:
    h, w = config.grid_of(*size)
    patches = h * w
    tokens = patches + config.num_prefix
    width, mlp_dim = config.width, config.mlp_dim
    embedding = patches * config.channels * config.patch_size**2 * width
    if config.stem is not None:
        macs, channels = stem_macs(config, size)
        embedding = macs + patches * channels * config.patch_size**2 * width
    block = tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * tokens**2 * width
    pool = 0
    if config.pool == "map":
        pool = 2 * patches * width**2 + 2 * width**2 + 2 * patches * width + 2 * width * mlp_dim
    return embedding + config.depth * block + pool


def stem_macs(config: ViTConfig, size: tuple[int, int]) -> tuple[int, int]:
    """MACs and output channels of a hybrid's ResNet."""
    middle = config.stem_width
    size = halve(size)
    total = size[0] * size[1] * 49 * config.channels * middle
    size = halve(size)
    units, channels = units_macs(config.stem or (), middle, middle, size, always_projects=False)
    return total + units, channels


def resnet_macs(config: ResNetConfig, size: tuple[int, int]) -> int:
    middle = 64 * config.width_factor
    size = halve(size)
    total = size[0] * size[1] * 49 * config.channels * middle
    units, _ = units_macs(config.units, middle, middle, halve(size), always_projects=True)
    return total + units


def units_macs(
    units: tuple[int, ...], inputs: int, middle: int, size: tuple[int, int], always_projects: bool
) -> tuple[int, int]:
    total = 0
    for i, num_units in enumerate(units):
        for j in range(num_units):
            stride = 2 if i and not j else 1
            before = size[0] * size[1]
            size = halve(size) if stride == 2 else size
            after = size[0] * size[1]
            outputs = 4 * middle
            total += before * inputs * middle + after * (9 * middle**2 + middle * outputs)
            if not j and (always_projects or stride != 1 or inputs != outputs):
                total += after * inputs * outputs
            inputs = outputs
        middle *= 2
    return total, inputs


def halve(size: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // 2), -(-size[1] // 2)
