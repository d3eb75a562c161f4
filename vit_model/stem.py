"""The ResNet stem of the hybrids: post-activation, weight standardisation, GroupNorm, TensorFlow's SAME padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_model.config import GROUPS, ViTConfig
from vit_model.shapes import Float
from vit_model.std_conv import StdConv2d, pad_same


class Bottleneck(nn.Module):
    """conv-GN-ReLU, conv-GN-ReLU, conv-GN, add, ReLU: the post-activation (v1) unit."""

    def __init__(self, inputs: int, middle: int, stride: int, config: ViTConfig) -> None:
        super().__init__()
        outputs = 4 * middle
        self.conv1, self.norm1 = std_conv(inputs, middle, 1, 1, config), group_norm(middle, config)
        self.conv2, self.norm2 = std_conv(middle, middle, 3, stride, config), group_norm(middle, config)
        self.conv3, self.norm3 = std_conv(middle, outputs, 1, 1, config), group_norm(outputs, config)
        projects = stride != 1 or inputs != outputs
        self.shortcut_conv = std_conv(inputs, outputs, 1, stride, config) if projects else None
        self.shortcut_norm = group_norm(outputs, config) if projects else None

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        shortcut = x
        if self.shortcut_conv is not None and self.shortcut_norm is not None:
            shortcut = self.shortcut_norm(self.shortcut_conv(x))
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        x = self.norm3(self.conv3(x))
        return F.relu(x.add_(shortcut), inplace=True)  # no norm needs its own output for the backward pass


class ResNetStem(nn.Module):
    """Root, then the stages; their first units have strides 1, 2, 2, ..."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.stem_width
        self.conv, self.norm = std_conv(config.channels, width, 7, 2, config), group_norm(width, config)
        self.stages = nn.Sequential()
        self.out_channels = width
        for i, num_units in enumerate(config.stem or ()):
            units = nn.Sequential()
            for j in range(num_units):
                units.append(Bottleneck(self.out_channels, width * 2**i, 2 if i and not j else 1, config))
                self.out_channels = 4 * width * 2**i
            self.stages.append(units)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = self.stages(root_pool(x))
        return x


def root_pool(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    """3x3, stride 2, SAME."""
    if x.shape[2] % 2 or x.shape[3] % 2:
        return F.max_pool2d(pad_same(x, 3, 2, 0.0), 3, 2)  # after a ReLU zeros pad like -inf
    if x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        # The kernel for channels last is vectorised, four times as fast with both copies; its backward pass is not.
        pooled = F.max_pool2d(x.contiguous(memory_format=torch.channels_last), 3, 2, ceil_mode=True)
        return pooled.contiguous()
    return F.max_pool2d(x, 3, 2, ceil_mode=True)  # SAME on even sides, without a padded copy


def std_conv(inputs: int, outputs: int, kernel: int, stride: int, config: ViTConfig) -> StdConv2d:
    eps, eps_on = (1e-5, "std") if config.stem_numerics == "google" else (1e-8, "variance")
    return StdConv2d(inputs, outputs, kernel, stride, same=True, eps=eps, eps_on=eps_on)


def group_norm(channels: int, config: ViTConfig) -> nn.GroupNorm:
    # Flax's default is 1e-6; timm leaves PyTorch's 1e-5.
    return nn.GroupNorm(min(GROUPS, channels), channels, eps=1e-6 if config.stem_numerics == "google" else 1e-5)
