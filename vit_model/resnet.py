"""BiT ResNets (arXiv 1912.11370), the paper's baselines: pre-activation, GroupNorm, weight standardisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vit_model.config import GROUPS, HeadKind, ResNetConfig
from vit_model.features import Features
from vit_model.heads import Head
from vit_model.shapes import Float, check_images
from vit_model.std_conv import StdConv2d


class PreActBottleneck(nn.Module):
    """GN-ReLU-conv three times, then add; a projection reads the pre-activated tensor."""

    def __init__(self, inputs: int, middle: int, stride: int, projects: bool, config: ResNetConfig) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs, config), std_conv(inputs, middle, 1, 1, config)
        self.norm2, self.conv2 = group_norm(middle, config), std_conv(middle, middle, 3, stride, config)
        self.norm3, self.conv3 = group_norm(middle, config), std_conv(middle, 4 * middle, 1, 1, config)
        self.shortcut = std_conv(inputs, 4 * middle, 1, stride, config) if projects else None

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = F.relu(self.norm1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = F.relu(self.norm2(self.conv1(y)), inplace=True)
        y = F.relu(self.norm3(self.conv2(y)), inplace=True)
        x = shortcut + self.conv3(y)
        return x


class ResNet(nn.Module):
    """Build it through `build_model`, which also initialises it."""

    def __init__(self, config: ResNetConfig, num_classes: int, head: HeadKind = "linear") -> None:
        super().__init__()
        self.config = config
        inputs = 64 * config.width_factor
        self.conv = std_conv(config.channels, inputs, 7, 2, config)
        self.stages = nn.ModuleList()
        for i, num_units in enumerate(config.units):
            units = nn.Sequential()
            middle = 64 * config.width_factor * 2**i
            for j in range(num_units):
                units.append(PreActBottleneck(inputs, middle, 2 if i and not j else 1, not j, config))
                inputs = 4 * middle
            self.stages.append(units)
        self.norm = group_norm(inputs, config)
        self.head = Head(inputs, num_classes, head)

    def forward(self, images: Tensor, tokens: bool = True, blocks: bool = False) -> Features:
        """The tokens of a ResNet are the positions of its last feature map; its blocks are its stages."""
        check_images(images, self.config.channels)
        x = self.conv(images)
        # No ReLU before this pool, so padding with zeros and with -inf differ where a whole window is negative.
        x = (
            F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
            if self.config.root_pool == "zero"
            else F.max_pool2d(x, 3, 2, padding=1)
        )
        states: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            if blocks:
                states.append(x.flatten(2).transpose(1, 2))
        x = F.relu(self.norm(x), inplace=True)
        logits, pre_logits = self.head(x.mean(dim=(2, 3)))
        return Features(
            logits, pre_logits, x.flatten(2).transpose(1, 2) if tokens else None, tuple(states) if blocks else None
        )


def std_conv(inputs: int, outputs: int, kernel: int, stride: int, config: ResNetConfig) -> StdConv2d:
    return StdConv2d(inputs, outputs, kernel, stride, same=False, eps=config.standardize_eps, eps_on="variance")


def group_norm(channels: int, config: ResNetConfig) -> nn.GroupNorm:
    return nn.GroupNorm(min(GROUPS, channels), channels, eps=config.group_norm_eps)
