"""RandAugment, ThreeAugment and colour jitter over a batch on the device.

What happens to an image follows from Philox(seed, epoch, sample_id) alone and is drawn on the host, so that nothing
waits for the device; images that get the same operation get it in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.reader import pixel_ops as ops
from pipelines.reader.levels import Changes
from pipelines.reader.philox import image_bits, uniform

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RANDAUGMENT", "THREE_AUGMENT", "change_images"]

# Streams of an image's random numbers; augment.py has those of crop and flip.
THREE_STREAM, JITTER_STREAM, LAYER_STREAM = 2, 3, 64  # Layer i draws from LAYER_STREAM + i.

RANDAUGMENT = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "cutout",
    "solarize_add",
)
THREE_AUGMENT = ("grey", "solarize", "blur")

FULL = 10.0  # The magnitude that the strengths below are stated for.
MAX_DEGREES, MAX_SHEAR = 30.0, 0.3
# Of the side: 100 and 40 pixels at 224, as the reference code has it.
MAX_TRANSLATE, MAX_CUTOUT = 100 / 224, 40 / 224
SIGMAS = (0.1, 2.0)

Draws = NDArray[np.float64]  # (n, 4), uniform in [0, 1)
Operation = Callable[["Tensor", Draws], "Tensor"]


def change_images(
    images: Tensor, changes: Changes, seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64]
) -> Tensor:
    """uint8 (B, C, H, W) with the operations of each image applied; `images` itself may be overwritten."""
    if changes.policy == "randaugment":
        for layer in range(changes.layers):
            draws = _draws(seed, epochs, sample_ids, LAYER_STREAM + layer)
            chosen = (draws[:, 0] * len(RANDAUGMENT)).astype(np.int64)
            for number in np.unique(chosen):
                _apply(images, chosen == number, draws, _randaugment(RANDAUGMENT[number], changes.magnitude))
    elif changes.policy == "three":
        draws = _draws(seed, epochs, sample_ids, THREE_STREAM)
        chosen = (draws[:, 0] * len(THREE_AUGMENT)).astype(np.int64)
        for number in np.unique(chosen):
            _apply(images, chosen == number, draws, _three(THREE_AUGMENT[number]))
    if changes.color_jitter:
        draws = _draws(seed, epochs, sample_ids, JITTER_STREAM)
        order = (draws[:, 3] * len(JITTER_ORDERS)).astype(np.int64)
        for number in np.unique(order):
            _apply(images, order == number, draws, _jitter(JITTER_ORDERS[number], changes.color_jitter))
    return images


def _draws(seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64], stream: int) -> Draws:
    bits = np.empty((len(sample_ids), 4), np.uint32)
    for epoch in np.unique(epochs):  # Two of them around an epoch's end.
        rows = epochs == epoch
        bits[rows] = image_bits(seed, int(epoch), sample_ids[rows], stream)
    return uniform(bits)


def _apply(images: Tensor, rows: NDArray[np.bool_], draws: Draws, operation: Operation) -> None:
    import torch

    index = torch.from_numpy(np.flatnonzero(rows))
    if images.is_cuda:
        index = index.pin_memory().to(images.device, non_blocking=True)
    changed = operation(images[index].float(), draws[rows])
    images[index] = changed.round_().clamp_(0, 255).to(torch.uint8)


def _values(like: Tensor, values: NDArray[np.float64] | float, count: int) -> Tensor:
    """One float32 for each image, on its device."""
    import torch

    if isinstance(values, float):
        return torch.full((count,), values, device=like.device)
    tensor = torch.from_numpy(values.astype(np.float32))
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor


def _randaugment(name: str, magnitude: float) -> Operation:
    level = magnitude / FULL
    enhance = level * 1.8 + 0.1

    def run(images: Tensor, draws: Draws) -> Tensor:
        n, (height, width) = len(images), images.shape[2:]
        sign = np.where(draws[:, 1] < 0.5, -1.0, 1.0)
        match name:
            case "autocontrast":
                return ops.autocontrast(images)
            case "equalize":
                return ops.equalize(images)
            case "invert":
                return ops.invert(images)
            case "posterize":
                return ops.posterize(images, _values(images, float(min(8, max(1, int(level * 4)))), n))
            case "solarize":
                return ops.solarize(images, _values(images, float(int(level * 256)), n))
            case "solarize_add":
                return ops.solarize_add(images, _values(images, float(int(level * 110)), n))
            case "color":
                return ops.saturation(images, _values(images, enhance, n))
            case "contrast":
                return ops.contrast(images, _values(images, enhance, n))
            case "brightness":
                return ops.brightness(images, _values(images, enhance, n))
            case "sharpness":
                return ops.sharpness(images, _values(images, enhance, n))
            case "cutout":
                half = _values(images, float(int(level * MAX_CUTOUT * min(height, width))), n)
                x, y = (_values(images, np.floor(draws[:, i] * side), n) for i, side in ((2, width), (3, height)))
                return ops.cutout(images, half, x, y)
        return ops.affine(images, _values(images, _matrix(name, level * sign, height, width), n))

    return run


def _matrix(name: str, strength: Draws, height: int, width: int) -> NDArray[np.float64]:
    """Where each pixel of the result comes from, in pixels from the centre; (n, 2, 3)."""
    matrix = np.zeros((len(strength), 2, 3))
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1.0
    match name:
        case "rotate":
            angle = np.deg2rad(MAX_DEGREES * strength)
            matrix[:, 0, 0] = matrix[:, 1, 1] = np.cos(angle)
            matrix[:, 0, 1], matrix[:, 1, 0] = -np.sin(angle), np.sin(angle)
        case "shear_x":
            matrix[:, 0, 1] = MAX_SHEAR * strength
        case "shear_y":
            matrix[:, 1, 0] = MAX_SHEAR * strength
        case "translate_x":
            matrix[:, 0, 2] = np.trunc(MAX_TRANSLATE * width * strength)
        case "translate_y":
            matrix[:, 1, 2] = np.trunc(MAX_TRANSLATE * height * strength)
        case _:
            raise AssertionError(name)
    return matrix


def _three(name: str) -> Operation:
    """Touvron et al., "DeiT III" (2022): one of grey, solarize, blur."""

    def run(images: Tensor, draws: Draws) -> Tensor:
        if name == "grey":
            return ops.grey(images).clone()
        if name == "solarize":
            return ops.solarize(images, _values(images, 128.0, len(images)))
        low, high = SIGMAS
        return ops.blur(images, _values(images, low + (high - low) * draws[:, 1], len(images)))

    return run


JITTER_OPS = (ops.brightness, ops.contrast, ops.saturation)
JITTER_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def _jitter(order: tuple[int, ...], strength: float) -> Operation:
    """Brightness, contrast and saturation by factors uniform in 1 - strength .. 1 + strength, in random order."""

    def run(images: Tensor, draws: Draws) -> Tensor:
        for i in order:
            images = JITTER_OPS[i](images, _values(images, 1 + strength * (2 * draws[:, i] - 1), len(images)))
        return images

    return run
