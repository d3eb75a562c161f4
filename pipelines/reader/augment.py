"""Which part of an image the model sees, and whether it is mirrored.

Deterministic: the numbers of an image come from Philox(seed, epoch, sample_id) and from nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.config import Strict, check_literals
from pipelines.reader.levels import LAYERS, MAGNITUDE, Level, Policy, check_changes
from pipelines.reader.philox import image_bits, uniform

__all__ = ["AugmentConfig", "Boxes", "crop_boxes", "dct_crops", "flips", "shifts"]

DCT_SCALES = (8, 4, 2)  # Powers of two alone have fast inverse transforms.
CROP_TRIES = 10  # With the paper's ranges a try fails only for images longer than about 1 : 15.
FLIP_STREAM, SHIFT_STREAM, CROP_STREAM = 0, 1, 16  # Crop try i draws from stream CROP_STREAM + i.

_USED_BY = {"inception": ("min_area", "max_area", "min_aspect", "max_aspect"), "random": ("padding",), "none": ()}


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig(Strict):
    """What training does to an image; evaluation never uses it. Crop and flip while reading, the rest on the device."""

    crop: Literal["inception", "random", "none"] = "inception"  # inception | random (shifted by padding) | none
    flip: bool = True  # Mirror left and right, p = 0.5; False where direction has a meaning (digits, text).
    min_area: float = 0.05  # inception: smallest crop, as a fraction of the image's area
    max_area: float = 1.0  # inception: largest crop, as a fraction of the image's area
    min_aspect: float = 0.75  # inception: width / height, at least
    max_aspect: float = 4 / 3  # inception: width / height, at most
    padding: int = 4  # random: black border in output pixels, through which the image is shifted
    preset: Level | None = None  # A level of AugReg by name; sets policy, layers, magnitude and mixup.
    policy: Policy = "none"  # randaugment | three (DeiT III: grey, solarize or blur) | none
    layers: int = LAYERS  # randaugment: operations on each image
    magnitude: float = MAGNITUDE  # randaugment: strength of all of them, of 10
    color_jitter: float = 0.0  # Brightness, contrast, saturation: factors uniform in 1 - j .. 1 + j; 0: none
    mixup: float = 0.0  # Alpha of the Beta distribution of shares; 0: none
    cutmix: float = 0.0  # The same for pasted boxes; with both, each lane of a step tosses a coin.

    def __post_init__(self) -> None:
        check_literals(self)
        if not 0 < self.min_area <= self.max_area <= 1:
            raise ValueError(
                f"min_area={self.min_area}, max_area={self.max_area} are not 0 < min_area <= max_area <= 1"
                "; the paper uses 0.05 and 1.0"
            )
        if not 0 < self.min_aspect <= self.max_aspect:
            raise ValueError(
                f"min_aspect={self.min_aspect}, max_aspect={self.max_aspect} are not 0 < min_aspect <= max_aspect"
                "; the paper uses 3/4 and 4/3"
            )
        if self.padding < 0:
            raise ValueError(f"padding={self.padding} is negative; use crop=none for no shift")
        for owner, names in _USED_BY.items():
            changed = [
                field.name
                for field in fields(self)
                if field.name in names and getattr(self, field.name) != field.default
            ]
            if owner != self.crop and changed:
                raise ValueError(
                    f"{', '.join(changed)} has no effect with crop={self.crop}; set crop={owner} or remove it"
                )
        check_changes(self)


@dataclass(frozen=True, slots=True)
class Boxes:
    """Crop of each image in its own pixels; int64 arrays (n,)."""

    x: NDArray[np.int64]
    y: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]

    def tolist(self) -> list[tuple[int, int, int, int]]:
        """(x, y, width, height) of each image."""
        return list(zip(*(part.tolist() for part in (self.x, self.y, self.width, self.height)), strict=True))


def crop_boxes(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    sample_ids: NDArray[np.int64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
) -> Boxes:
    """The crop of each image. The law of TensorFlow's sample_distorted_bounding_box, which the paper's code calls.

    Aspect ratio uniform, then height uniform over what the area range allows. One difference: TensorFlow never puts a
    crop against the right or lower border (its offset excludes the last position); here every position is possible.
    """
    boxes = Boxes(np.zeros_like(widths), np.zeros_like(widths), widths.copy(), heights.copy())
    if config.crop != "inception":
        return boxes
    todo = np.arange(len(sample_ids))
    for attempt in range(CROP_TRIES):
        u = uniform(image_bits(seed, epoch, sample_ids[todo], CROP_STREAM + attempt))
        width, height = _crop_sizes(config, u[:, 0], u[:, 1], widths[todo], heights[todo])
        good = (width > 0) & (height > 0)
        chosen, width, height = todo[good], width[good], height[good]
        boxes.width[chosen], boxes.height[chosen] = width, height
        boxes.x[chosen] = (u[good, 2] * (widths[chosen] - width + 1)).astype(np.int64)
        boxes.y[chosen] = (u[good, 3] * (heights[chosen] - height + 1)).astype(np.int64)
        todo = todo[~good]
        if not len(todo):
            break
    return boxes  # What is left keeps the whole image, as in TensorFlow.


def dct_crops(
    boxes: Boxes, width: int, height: int, has_scales: NDArray[np.bool_] | Literal[True] = True
) -> NDArray[np.int64]:
    """(n, 5): scale, and x, y, width and height in pixels of the image decoded at 1 / scale.

    A JPEG can be decoded at 1/2, 1/4 and 1/8 for less; the scale is the smallest image that still has a pixel for every
    pixel of the model's width x height. Where has_scales is False it is 1. A scaled box is widened to whole pixels.
    """
    scale = np.ones_like(boxes.x)
    for factor in reversed(DCT_SCALES):
        scale[has_scales & (boxes.width >= factor * width) & (boxes.height >= factor * height)] = factor
    x, y = boxes.x // scale, boxes.y // scale
    right, bottom = -(-(boxes.x + boxes.width) // scale), -(-(boxes.y + boxes.height) // scale)
    return np.stack([scale, x, y, right - x, bottom - y], axis=1)


def _crop_sizes(
    config: AugmentConfig,
    u_aspect: NDArray[np.float64],
    u_height: NDArray[np.float64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One try: width and height of each crop, 0 where the ranges cannot be met."""
    aspect = config.min_aspect + u_aspect * (config.max_aspect - config.min_aspect)
    area = (widths * heights).astype(np.float64)
    least, most = config.min_area * area, config.max_area * area
    low = np.rint(np.sqrt(least / aspect)).astype(np.int64)
    high = np.rint(np.sqrt(most / aspect)).astype(np.int64)
    too_wide = np.rint(high * aspect) > widths
    high = np.where(too_wide, ((widths + 0.5 - 1e-7) / aspect).astype(np.int64), high)
    high = np.minimum(high - (np.rint(high * aspect) > widths), heights)
    low = np.minimum(low, high)
    height = low + (u_height * (high - low + 1)).astype(np.int64)
    width = np.rint(height * aspect).astype(np.int64)
    # Rounding may leave the area just outside its range: one pixel more or less of height mends it.
    height = height + (width * height < least)
    width = np.rint(height * aspect).astype(np.int64)
    height = height - (width * height > most)
    width = np.rint(height * aspect).astype(np.int64)
    inside = (width * height >= least) & (width * height <= most) & (width <= widths) & (height <= heights)
    return np.where(inside, width, 0), np.where(inside, height, 0)


def flips(config: AugmentConfig, seed: int, epoch: int, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images are mirrored."""
    if not config.flip:
        return np.zeros(len(sample_ids), np.bool_)
    return image_bits(seed, epoch, sample_ids, FLIP_STREAM)[:, 0] < np.uint32(1 << 31)


def shifts(config: AugmentConfig, seed: int, epoch: int, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """crop=random: (n, 2) offsets (y, x) of each output inside its padded image, 0 .. 2 * padding."""
    bits = image_bits(seed, epoch, sample_ids, SHIFT_STREAM)[:, :2]
    return (uniform(bits) * (2 * config.padding + 1)).astype(np.int64)
