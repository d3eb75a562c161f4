"""The ResNet stem of the hybrids: post-activation, weight standardisation, GroupNorm, TensorFlow's SAME padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_model.config import ViTConfig
from vit_model.shapes import Float

GROUPS = 32


class StdConv2d(nn.Conv2d):
    """A convolution with its kernel standardised per output channel (arXiv 1903.10520), without bias.

    Three codebases, three epsilons: the hybrids divide by std + 1e-5, BiT by sqrt(var + 1e-10), timm by
    sqrt(var + 1e-8).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, same: bool, eps: float, eps_on: str
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=0 if same else (kernel - 1) // 2, bias=False)
        self.same = same
        self.eps = eps
        self.eps_on = eps_on

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        if self.same:
            x = pad_same(x, self.kernel_size[0], self.stride[0], 0.0)
        return F.conv2d(x, self.standardized(), None, self.stride, self.padding)

    def standardized(self) -> Tensor:
        weight = self.weight.flatten(1)
        if self.eps_on == "variance":
            return F.layer_norm(weight, weight.shape[1:], eps=self.eps).view_as(self.weight)
        var, mean = torch.var_mean(weight, dim=1, correction=0, keepdim=True)
        # The tiny floor keeps the gradient of sqrt finite for a constant kernel; it changes no float32 result.
        scale = 1 / ((var + 1e-20).sqrt() + self.eps)
        # w*s - m*s and not (w - m)*s: nothing as large as the kernel is then kept for the backward pass.
        return torch.addcmul(-mean * scale, weight, scale).view_as(self.weight)


def pad_same(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """TensorFlow's SAME: what is odd goes after; at stride 2 on an even side a 3x3 kernel gets 0 before, 1 after."""
    pads: list[int] = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value) if any(pads) else x


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
        if x.shape[2] % 2 or x.shape[3] % 2:
            x = F.max_pool2d(pad_same(x, 3, 2, 0.0), 3, 2)  # after a ReLU zeros pad like -inf
        else:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)  # SAME on even sides, without a padded copy
        x = self.stages(x)
        return x


def std_conv(inputs: int, outputs: int, kernel: int, stride: int, config: ViTConfig) -> StdConv2d:
    eps, eps_on = (1e-5, "std") if config.stem_numerics == "google" else (1e-8, "variance")
    return StdConv2d(inputs, outputs, kernel, stride, same=True, eps=eps, eps_on=eps_on)


def group_norm(channels: int, config: ViTConfig) -> nn.GroupNorm:
    # Flax's default is 1e-6; timm leaves PyTorch's 1e-5.
    return nn.GroupNorm(min(GROUPS, channels), channels, eps=1e-6 if config.stem_numerics == "google" else 1e-5)
