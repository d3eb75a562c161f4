"""The C extension that decodes plain JPEGs, where it was built: crop, resize and mirror in one pass, without the GIL.

Its pixels are those of the wheels (libjpeg-turbo's accurate DCT and fancy upsampling, torch's uint8 resize), bit for
bit. What it does not take (progressive, CMYK, rotated by EXIF, damaged, PNG, WebP ...) it names, and others decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vit_model.preprocess import InputSpec

__all__ = ["VERSION", "decode", "has_simd", "read_sizes", "serves", "why_not"]

VERSION = 1  # Raised when the same file would give other pixels.

try:
    from pipelines.reader.native import _jpeg
except ImportError as error:  # Built without a compiler, or for another Python.
    # Python words a missing one as a circular import.
    _why_not = str(error) if find_spec(f"{__name__}._jpeg") else "its C file was not compiled"
else:
    _why_not = ""


def why_not() -> str:
    """Why the extension is not here; empty if it is."""
    return _why_not


def has_simd() -> bool:
    """Whether its vector code runs on this processor; without it the wheels are as fast."""
    return not _why_not and _jpeg.has_simd()


def serves(spec: InputSpec) -> bool:
    """Whether it makes images of this kind."""
    return spec.channels == 3 and spec.antialias


def read_sizes(images: Sequence[memoryview]) -> NDArray[np.int32]:
    """(n, 2): width and height; 0 where decode() would not take the file."""
    sizes = np.zeros((len(images), 2), np.int32)
    _jpeg.read_sizes(images, sizes)
    return sizes


def decode(
    images: Sequence[memoryview],
    crops: NDArray[np.int32],
    places: NDArray[np.int64],
    out: NDArray[np.uint8],
    spec: InputSpec,
    *,
    simd: bool = True,
) -> NDArray[np.uint8]:
    """Crop i of image i into out[places[i]], and (n,) what went wrong: 0 where nothing did.

    crops (n, 6): scale, x, y, width, height, flip; in pixels of the image at 1 / scale, which is 1, 2, 4 or 8.
    A place whose image failed holds anything.
    """
    status = np.zeros(len(images), np.uint8)
    cubic = spec.interpolation == "bicubic"
    _jpeg.decode(images, crops, places, out, status, spec.height, spec.width, cubic, simd)
    return status
