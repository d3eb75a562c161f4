"""Operations of RandAugment and its kin on a batch, each image with its own strength. On any device.

Images are float32 (n, C, H, W) with values 0..255, strengths float32 (n,). The laws are those of Pillow, which
AutoAugment (Cubuk et al. 2019) and RandAugment (2020) were defined with; geometry takes the nearest pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "affine",
    "autocontrast",
    "blur",
    "brightness",
    "contrast",
    "cutout",
    "equalize",
    "grey",
    "invert",
    "posterize",
    "saturation",
    "sharpness",
    "solarize",
    "solarize_add",
]

FILL = 128.0  # What lies outside the image, as in AutoAugment.
LUMA = (0.299, 0.587, 0.114)
BLUR_REACH = 6  # Pixels on each side: three times the largest sigma.


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(degenerate, images, _each(factor)).clamp_(0, 255)


def grey(images: Tensor) -> Tensor:
    """Luma in every channel; grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).expand_as(images)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _each(factor)).clamp_(0, 255)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """About the mean luma of each image."""
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True).expand_as(images)
    return _blend(mean, images, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(grey(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Against a 3x3 smoothing; the border is not smoothed."""
    channels = images.shape[1]
    kernel = images.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).div_(13).expand(channels, 1, 3, 3)
    smooth = images.clone()
    if min(images.shape[2:]) > 2:
        smooth[..., 1:-1, 1:-1] = F.conv2d(images, kernel, groups=channels)
    return _blend(smooth, images, factor)


def invert(images: Tensor) -> Tensor:
    return 255 - images


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < _each(threshold), images, 255 - images)


def solarize_add(images: Tensor, addition: Tensor) -> Tensor:
    return torch.where(images < 128, (images + _each(addition)).clamp(0, 255), images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` upper bits of each value."""
    step = _each(torch.exp2(8 - bits))
    return torch.floor(images / step) * step


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a channel of one value stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    spread = high - low
    stretched = (images - low) * (255 / spread.clamp(min=1))
    return torch.where(spread > 0, stretched, images).clamp_(0, 255)


def equalize(images: Tensor) -> Tensor:
    """Level the histogram of each channel."""
    n, channels, height, width = images.shape
    values = images.to(torch.int64).view(n * channels, height * width)
    counts = torch.zeros(n * channels, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    last = counts.gather(1, values.amax(dim=1, keepdim=True))  # Pixels of the brightest value that occurs.
    step = (height * width - last).div(255, rounding_mode="floor")
    below = counts.cumsum(1) - counts
    table = (below + step.div(2, rounding_mode="floor")).div(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    levelled = table.gather(1, values).view_as(images).to(images.dtype)
    return torch.where(step.view(n, channels, 1, 1) > 0, levelled, images)


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Pixel (x, y) of the result is the input's matrix (n, 2, 3) @ (x, y, 1), in pixels from the centre."""
    height, width = images.shape[2:]
    # grid_sample counts half sides: x_pixels = x_unit * width / 2.
    half = images.new_tensor([width / 2, height / 2])
    theta = matrix.clone()
    theta[:, :, :2] *= half.view(1, 1, 2)
    theta /= half.view(1, 2, 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Shifted by the fill, so that what grid_sample calls zero is the fill.
    moved = F.grid_sample(images - FILL, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved + FILL


def cutout(images: Tensor, half_side: Tensor, center_x: Tensor, center_y: Tensor) -> Tensor:
    """A square of 2 * half_side pixels around a point, cut at the border, becomes grey."""
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device, dtype=images.dtype).view(1, 1, -1, 1)
    x = torch.arange(width, device=images.device, dtype=images.dtype).view(1, 1, 1, -1)
    half = _each(half_side)
    inside_y = (y >= _each(center_y) - half) & (y < _each(center_y) + half)
    inside_x = (x >= _each(center_x) - half) & (x < _each(center_x) + half)
    return torch.where(inside_y & inside_x, FILL, images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian, mirrored at the border."""
    n, channels, height, width = images.shape
    reach = min(BLUR_REACH, height - 1, width - 1)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets.view(1, -1) / sigma.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    planes = F.pad(images, (reach, reach, reach, reach), mode="reflect").view(1, n * channels, height + 2 * reach, -1)
    planes = F.conv2d(planes, kernel.view(n * channels, 1, 1, -1), groups=n * channels)
    planes = F.conv2d(planes, kernel.view(n * channels, 1, -1, 1), groups=n * channels)
    return planes.view(n, channels, height, width)
