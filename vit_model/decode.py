"""Image bytes -> uint8 pixels by stated rules, so that a picture has the same pixels wherever it is read.

format      JPEG, PNG, WebP, GIF, BMP, TIFF by content, never by name; anything else is refused
limits      100 MiB of bytes, 100 million pixels, checked before a pixel is decoded
EXIF        the orientation is applied
animation   the first frame
alpha       laid over white (a palette or grey with transparency too)
16 bit grey scaled by 255/65535 and rounded; 16 bit RGB keeps the high byte (Pillow reads it so)
CMYK, YCCK, palette, bilevel           converted to RGB or grey; grey of RGB is Pillow's L (ITU-R 601)
float and 32 bit integer pixels        refused: they have no fixed range
LAB         refused: its colours depend on an illuminant that files seldom tell
truncated   refused
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_model.shapes import UInt8

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 100 * 2**20
MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow opens MPO, a JPEG with more pictures, as a JPEG

Reason = Literal["empty", "too_many_bytes", "unknown_format", "too_many_pixels", "unsupported_mode", "undecodable"]


class ImageError(ValueError):
    """An image that cannot be used; `reason` is one of a few words, for counting."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[Reason, str]]:
        return ImageError, (self.reason, str(self))  # worker processes send it home


def decode_image(
    data: bytes, channels: int, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "C H W"]:
    """Raises ImageError. One channel is grey, three are RGB."""
    if channels not in (1, 3):
        raise ValueError(f"channels={channels} is not 1 (grey) or 3 (RGB)")
    if not data:
        raise ImageError("empty", "image has no bytes")
    if len(data) > max_bytes:
        raise ImageError("too_many_bytes", f"image has {len(data)} bytes; the limit is {max_bytes}")
    pixels = decode_pixels(data, channels, max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode_pixels(data: bytes, channels: int, max_pixels: int) -> NDArray[np.uint8]:
    """(H, W, C), own memory."""
    import simplejpeg
    from PIL import Image, UnidentifiedImageError

    faults = (  # TypeError and the like come out of Pillow for damaged TIFF tags.
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
        SyntaxError,
        EOFError,
        KeyError,
        IndexError,
        struct.error,
        MemoryError,
    )
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        size, mode, kind = image.size, image.mode, image.format
        orientation = image.getexif().get(0x0112, 1)
    except UnidentifiedImageError as error:
        raise ImageError("unknown_format", f"bytes beginning {data[:8]!r} are none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except faults as error:
        raise ImageError("undecodable", f"image header cannot be read: {error}") from error
    if size[0] * size[1] > max_pixels:
        raise ImageError("too_many_pixels", f"image is {size[0]}x{size[1]} px; the limit is {max_pixels} pixels")
    if mode == "LAB":
        raise ImageError("unsupported_mode", "pixels of mode 'LAB' have no agreed colours; convert to RGB")
    if mode in ("F", "I"):
        raise ImageError("unsupported_mode", f"pixels of mode {mode!r} have no fixed range; convert to 8 or 16 bit")
    try:
        if kind in ("JPEG", "MPO") and mode in ("L", "RGB"):
            # The same pixels as Pillow's libjpeg-turbo gives, without two copies.
            pixels = simplejpeg.decode_jpeg(
                data, colorspace="RGB" if mode == "RGB" or channels == 3 else "GRAY", strict=True
            )
            if pixels.shape[2] > channels:  # not the luma plane of the file, which differs where colours were clipped
                pixels = np.array(Image.fromarray(pixels).convert("L"))
        else:
            pixels = np.array(flatten_modes(image, channels))
            orientation = image.getexif().get(0x0112, 1)  # asked again: of a TIFF, Pillow applies it as it loads
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except faults as error:
        raise ImageError("undecodable", f"{kind} image cannot be decoded: {error}") from error
    turned = np.ascontiguousarray(upright(pixels.reshape(*pixels.shape[:2], channels), orientation))
    # Of a side of 1 px numpy calls a reversed view contiguous, and torch refuses its negative stride.
    return turned if min(turned.strides) > 0 else turned.copy()


def flatten_modes(image: Image.Image, channels: int) -> Image.Image:
    """Any mode to L or RGB by the rules above."""
    from PIL import Image as Pillow

    target = "RGB" if channels == 3 else "L"
    image.load()
    if image.mode.startswith("I;16"):
        values = np.array(image).astype(np.uint32)
        return Pillow.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert(target)
    if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(white, image).convert(target)
    return image.convert(target)


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """EXIF orientation 2..8; unknown values leave the picture as it is."""
    match orientation:
        case 2:
            return pixels[:, ::-1]
        case 3:
            return pixels[::-1, ::-1]
        case 4:
            return pixels[::-1]
        case 5:
            return pixels.transpose(1, 0, 2)
        case 6:
            return np.rot90(pixels, -1)
        case 7:
            return pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            return np.rot90(pixels, 1)
    return pixels
