"""Decoding with wheels alone: simplejpeg and Pillow to pixels, torch's uint8 antialiased resize to the model's size.

Plain JPEG and PNG files take a short way with the same pixels as `vit_model.preprocess`. What is not plain (a rotation,
CMYK, alpha, 16 bit, palettes, WebP) is None here, and goes the reference path.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vit_model.preprocess import InputSpec

__all__ = ["Crop", "Source", "open_plain", "resize"]

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
PLAIN_PIXELS = 1 << 26  # The short way leaves larger images to vit_model.preprocess and its limits.
ORIENTATION = 0x0112

Crop = tuple[int, int, int, int, int]  # scale, and x, y, width, height in pixels of the image at 1 / scale


class Source(Protocol):
    """A plain image whose size is known and whose pixels are not yet decoded."""

    @property
    def size(self) -> tuple[int, int]: ...  # width, height
    @property
    def has_scales(self) -> bool: ...  # Whether it can be decoded at 1/2, 1/4 and 1/8.
    def pixels(self, crop: Crop) -> NDArray[np.uint8]: ...  # (h, w, C)


def open_plain(data: memoryview, channels: int) -> Source | None:
    """The image, if the short way gives the reference path's pixels; its header alone is read."""
    try:
        if bytes(data[:8]) == PNG:
            return _PngSource.open(data, channels)
        if bytes(data[:3]) == JPEG and channels == 3:
            return _JpegSource.open(data)
    except Exception:  # A broken header: the reference path names what is wrong.
        return None
    return None


class _JpegSource:
    has_scales = True

    def __init__(self, data: memoryview, size: tuple[int, int]) -> None:
        self.data, self.size = data, size

    @classmethod
    def open(cls, data: memoryview) -> _JpegSource | None:
        import simplejpeg

        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "Gray", "RGB") or width * height > PLAIN_PIXELS or not _is_upright(data):
            return None
        return cls(data, (width, height))

    def pixels(self, crop: Crop) -> NDArray[np.uint8]:
        import simplejpeg

        scale, x, y, width, height = crop
        least_width, least_height = (-(-side // scale) for side in self.size)
        decoded = simplejpeg.decode_jpeg(self.data, "RGB", min_height=least_height, min_width=least_width)
        pixels: NDArray[np.uint8] = decoded[y : y + height, x : x + width]
        return pixels


class _PngSource:
    has_scales = False

    def __init__(self, image: Any, channels: int) -> None:
        self.image, self.channels, self.size = image, channels, image.size

    @classmethod
    def open(cls, data: memoryview, channels: int) -> _PngSource | None:
        from PIL import Image

        image = Image.open(io.BytesIO(data), formats=("PNG",))
        width, height = image.size
        # Pillow's mode is set by the header; "transparency" may still appear in it as a chunk.
        is_plain = image.mode == ("L" if channels == 1 else "RGB") or (channels == 3 and image.mode == "L")
        if not is_plain or image.info or width * height > PLAIN_PIXELS:
            return None
        return cls(image, channels)

    def pixels(self, crop: Crop) -> NDArray[np.uint8]:
        _, x, y, width, height = crop
        pixels = np.asarray(self.image)[y : y + height, x : x + width]
        return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], self.channels, axis=2)


def _is_upright(data: memoryview) -> bool:
    """Whether surely no APP1 segment (EXIF, XMP) before the image data turns the picture."""
    at, num_exif = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # Start of scan.
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xE1:
            segment = bytes(data[at + 4 : at + 2 + length])
            if segment.startswith(b"Exif\0\0"):
                num_exif += 1
                if num_exif > 1 or not _is_upright_tiff(segment[6:]):
                    return False
            elif b"Orientation" in segment:
                return False
        at += 2 + length
    return True


def _is_upright_tiff(tiff: bytes) -> bool:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == ORIENTATION and (kind, values, value) != (3, 1, 1):
                return False
    except struct.error:
        return False
    return True


def resize(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """Images (n, h, w, C) of one size to (n, C, H, W) of the model's size."""
    import torch
    import torch.nn.functional as F

    # Pillow's arrays are read-only, of which torch warns.
    tensor = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(0, 3, 1, 2)
    size = (spec.height, spec.width)
    if tensor.shape[-2:] != size:
        tensor = F.interpolate(tensor, size=size, mode=spec.interpolation, antialias=spec.antialias)
    resized: NDArray[np.uint8] = tensor.numpy()
    return resized
