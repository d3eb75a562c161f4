"""JPEGs decoded by nvJPEG, through torchvision where that is installed with CUDA: an option, `reader.nvjpeg`.

Crops are those of the other engines, in pixels of the whole image: nvJPEG decodes at one scale only, and it rounds in
its own way, so its pixels are its own. They come back to host memory, since a step is put together there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from vit_model.preprocess import InputSpec

__all__ = ["decode", "why_not"]

TOGETHER = 32  # Whole images that lie decoded in the GPU's memory at a time, about 0.6 MB each.


@lru_cache
def why_not() -> str:
    """Why it cannot decode here; empty if it can."""
    import torch

    try:
        _torchvision()
    except Exception as error:  # A torchvision made for another torch fails in its own ways.
        return f"torchvision cannot be imported: {error}"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def decode(images: Sequence[memoryview], boxes: NDArray[np.int64], spec: InputSpec) -> list[NDArray[np.uint8] | None]:
    """Box (x, y, width, height) of each JPEG at the model's size, (C, H, W); None for a file that is not decoded."""
    import torch

    done: list[NDArray[np.uint8] | None] = []
    for first in range(0, len(images), TOGETHER):
        together = slice(first, first + TOGETHER)
        whole = _decode(images[together])
        resized = {
            i: _resize(image[:, y : y + height, x : x + width], spec)
            for i, (image, (x, y, width, height)) in enumerate(zip(whole, boxes[together].tolist(), strict=True))
            if image is not None
        }
        # One copy back for all of them.
        pixels = iter(torch.stack(list(resized.values())).cpu().numpy() if resized else ())
        done += [next(pixels) if i in resized else None for i in range(len(whole))]
    return done


def _torchvision() -> Any:
    import torchvision.io

    return torchvision.io


@lru_cache
def _device() -> torch.device:
    """The GPU of the thread that asks first: the one that checks the engine, before threads of their own decode."""
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def _decode(images: Sequence[memoryview]) -> list[torch.Tensor | None]:
    """(3, h, w) on the device; one damaged file fails a whole call, so that after it each is tried alone."""
    import torch

    io = _torchvision()
    files = [torch.from_numpy(np.frombuffer(image, np.uint8).copy()) for image in images]
    try:
        return list(io.decode_jpeg(files, mode=io.ImageReadMode.RGB, device=_device()))
    except RuntimeError:
        return [None] if len(images) == 1 else [found for image in images for found in _decode([image])]


def _resize(pixels: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    import torch
    import torch.nn.functional as F

    size = (spec.height, spec.width)
    # On CUDA only floating point is resized.
    resized = F.interpolate(pixels[None].float(), size=size, mode=spec.interpolation, antialias=spec.antialias)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)
