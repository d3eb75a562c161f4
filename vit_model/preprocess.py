"""From image bytes to the tensor a model takes: the one reference path that evaluation, prediction and serving share.

Pillow and simplejpeg are imported on the first call, so that the rest of the package needs neither.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_model.config import check_choices
from vit_model.decode import MAX_PIXELS, ImageError, decode_image
from vit_model.shapes import Float, UInt8

__all__ = ["ImageError", "InputSpec", "OutputSpec", "decode_image", "load_image", "normalize", "resize_image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """How bytes become a tensor. mean and std are in units of 0..1: 0.5 and 0.5 give -1..1 as in the paper's code."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    version: Literal[1] = 1
    channels: int = 3
    height: int = 224  # px, of the tensor
    width: int = 224
    resize: Literal["square", "shorter_side"] = "square"  # straight to (height, width), or shorter side and centre crop
    resize_to: int | None = None  # shorter_side: its length in px
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {self.channels} channels")
            if not all(math.isfinite(value) for value in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} has a value that is not finite")
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels} is not 1 (grey) or 3 (RGB)")
        if type(self.height) is not int or type(self.width) is not int or min(self.height, self.width) < 1:
            raise ValueError(f"size {self.height}x{self.width} is not positive whole numbers of px")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} has a value that is not positive")
        if self.resize == "square" and self.resize_to is not None:
            raise ValueError(f"resize_to={self.resize_to} has no effect with resize='square'")
        if self.resize == "shorter_side" and (self.resize_to is None or self.resize_to < max(self.height, self.width)):
            raise ValueError(
                f"resize_to={self.resize_to} is smaller than the {self.height}x{self.width} crop taken from it"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> InputSpec:
        return cls(**plain_tuples(json.loads(text)))


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSpec:
    """What the logits mean."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    version: Literal[1] = 1
    class_names: tuple[str, ...]
    activation: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        check_choices(self)
        if not isinstance(self.class_names, tuple) or not all(isinstance(name, str) for name in self.class_names):
            raise ValueError("class_names is not a tuple of strings, one per class")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> OutputSpec:
        return cls(**plain_tuples(json.loads(text)))

    def probabilities(self, logits: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        return logits.float().softmax(dim=-1) if self.activation == "softmax" else logits.float().sigmoid()


def plain_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only; a frozen, hashable spec holds tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def load_image(data: bytes, spec: InputSpec) -> UInt8[Tensor, "C H W"]:
    """Decode, resize and crop; raises ImageError."""
    return resize_image(decode_image(data, spec.channels), spec)


def resize_image(image: UInt8[Tensor, "C h w"], spec: InputSpec) -> UInt8[Tensor, "C H W"]:
    if spec.resize == "square":
        return resize_pixels(image, spec.height, spec.width, spec)
    _, height, width = image.shape
    shorter = spec.resize_to or min(height, width)
    scale = shorter / min(height, width)
    # The longer side is rounded half up; never below the crop.
    size = max(int(height * scale + 0.5), shorter), max(int(width * scale + 0.5), shorter)
    if size[0] * size[1] > MAX_PIXELS:  # a thread of 1x60000 px would become 12 GB
        text = f"image of {height}x{width} px becomes {size[0]}x{size[1]} with its shorter side resized to {shorter}"
        raise ImageError("too_many_pixels", f"{text}; the limit is {MAX_PIXELS} pixels")
    image = resize_pixels(image, *size, spec)
    top, left = (image.shape[1] - spec.height) // 2, (image.shape[2] - spec.width) // 2
    return image[:, top : top + spec.height, left : left + spec.width].contiguous()


def resize_pixels(image: UInt8[Tensor, "C h w"], height: int, width: int, spec: InputSpec) -> UInt8[Tensor, "C H W"]:
    if image.shape[1:] == (height, width):
        return image
    batch = image[None]
    resized = F.interpolate(
        batch, size=(height, width), mode=spec.interpolation, align_corners=False, antialias=spec.antialias
    )
    return resized[0].contiguous()


def normalize(
    images: UInt8[Tensor, "B C H W"], spec: InputSpec, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "B C H W"]:
    """(x / 255 - mean) / std as one multiplication and one addition, on the device of the images."""
    scale = torch.tensor([1 / (255 * s) for s in spec.std], device=images.device, dtype=torch.float32).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(spec.mean, spec.std, strict=True)], device=images.device).view(
        -1, 1, 1
    )
    return torch.addcmul(shift, images.to(torch.float32), scale).to(dtype)
