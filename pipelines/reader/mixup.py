"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) inside the images that a lane gives to a step.

The draws follow from Philox(seed, step, lane) alone, so a mixed image is the same at any number of workers. Each lane
draws one lambda; image i of a lane meets image i + 1, the last one the first. Where both are on, each lane tosses a
coin. A bad sample (weight 0) is mixed with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.reader.philox import WORD, philox4x32, uniform

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mix", "draw_mix", "mix_images", "mix_labels"]

MIX_STREAM = 128  # Beside the streams of single images.


@dataclass(frozen=True, slots=True)
class Mix:
    """What each row of a batch is mixed with. Arrays of length B."""

    partner: NDArray[np.int64]  # Place in the batch.
    share: NDArray[np.float32]  # Of the row itself, in pixels and in its label; at least 0.5 for mixup.
    box: NDArray[np.int64]  # (B, 4) CutMix: top, bottom, left, right of what the partner gives; mixup: no box at all.
    is_cut: NDArray[np.bool_]


def draw_mix(
    mixup: float,
    cutmix: float,
    seed: int,
    step: int,
    lanes: NDArray[np.int64],
    weights: NDArray[np.float32],
    size: tuple[int, int],
) -> Mix:
    """`mixup`, `cutmix`: alphas, 0 is off. `lanes`, `weights`: of each row. `size`: height and width of the images."""
    from scipy.special import betaincinv

    rows = len(lanes)
    mix = Mix(np.arange(rows), np.ones(rows, np.float32), np.zeros((rows, 4), np.int64), np.zeros(rows, np.bool_))
    numbers, index = np.unique(lanes, return_inverse=True)
    first, second = (_draws(seed, step, numbers, MIX_STREAM + i) for i in range(2))
    height, width = size
    for at in range(len(numbers)):
        members = np.flatnonzero((index == at) & (weights > 0))
        if len(members) < 2:
            continue
        cuts = cutmix > 0 and (not mixup or first[at, 0] < 0.5)
        alpha = cutmix if cuts else mixup
        share = float(betaincinv(alpha, alpha, first[at, 1]))
        mix.partner[members] = np.roll(members, -1)
        if cuts:
            box = _box(1 - share, second[at, 0], second[at, 1], height, width)
            top, bottom, left, right = box
            share = 1 - (bottom - top) * (right - left) / (height * width)
            mix.box[members], mix.is_cut[members] = box, True
        else:
            share = max(share, 1 - share)  # The row is the one that it shows most of.
        mix.share[members] = share
    return mix


def _draws(seed: int, step: int, lanes: NDArray[np.int64], stream: int) -> NDArray[np.float64]:
    counters = np.empty((len(lanes), 4), np.uint32)
    counters[:, 0], counters[:, 1], counters[:, 2], counters[:, 3] = lanes, step & WORD, step >> 32, stream
    return uniform(philox4x32(counters, (seed & WORD, seed >> 32 & WORD)))


def _box(area: float, u_y: float, u_x: float, height: int, width: int) -> tuple[int, int, int, int]:
    """A box of that share of the area around a uniform point, cut at the borders."""
    side = area**0.5
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    y, x = int(u_y * height), int(u_x * width)
    return max(0, y - half_y), min(height, y + half_y), max(0, x - half_x), min(width, x + half_x)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """uint8 (B, C, H, W), mixed; rounded to the nearest whole value."""
    import torch

    height, width = images.shape[2:]
    partner, share = _on(images, mix.partner), _on(images, mix.share).view(-1, 1, 1, 1)
    mixed = images
    if not mix.is_cut.all():
        mixed = torch.lerp(images[partner].float(), images.float(), share).round_().to(torch.uint8)
    if mix.is_cut.any():
        top, bottom, left, right = (_on(images, mix.box[:, i].copy()).view(-1, 1, 1, 1) for i in range(4))
        y = torch.arange(height, device=images.device).view(1, 1, -1, 1)
        x = torch.arange(width, device=images.device).view(1, 1, 1, -1)
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        cut = _on(images, mix.is_cut).view(-1, 1, 1, 1)
        mixed = torch.where(cut, torch.where(inside, images[partner], images), mixed)
    return mixed


def mix_labels(labels: Tensor, mix: Mix, num_classes: int) -> Tensor:
    """float32 (B, K): each row's own label and its partner's, by their shares."""
    import torch
    import torch.nn.functional as F

    hot = F.one_hot(labels, num_classes).float() if labels.ndim == 1 else labels.float()
    return torch.lerp(hot[_on(labels, mix.partner)], hot, _on(labels, mix.share).view(-1, 1))


def _on(like: Tensor, values: NDArray[np.generic]) -> Tensor:
    import torch

    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor
