"""The decode engine `wheels`: simplejpeg and Pillow to pixels, torch's uint8 antialiased resize to the model's size.

Plain JPEG and PNG files take a short way with the same pixels as `vit_model.preprocess`; everything else (EXIF
rotation, CMYK, alpha, 16 bit, palettes, WebP, and whatever fails) goes through it and gets its verdict.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.reader.augment import AugmentConfig, crop_boxes, flips, shifts

if TYPE_CHECKING:
    from vit_model.preprocess import InputSpec

__all__ = ["ENGINE", "Faults", "decode_for_evaluation", "decode_for_training", "engine_version"]

ENGINE = "wheels"
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
PLAIN_PIXELS = 1 << 26  # The short way leaves larger images to vit_model.preprocess and its limits.
TINY = 1 << 14  # Bytes. Below, the call that resizes costs more than its work, and images of one size share it.
DCT_SCALES = (8, 4, 2)  # Powers of two alone have fast inverse transforms in libjpeg-turbo.

Faults = dict[int, tuple[str, str]]  # place -> (reason, text)
Box = tuple[int, int, int, int]  # x, y, width, height


def engine_version() -> str:
    """Name and versions that decide the pixels; for run and checkpoint."""
    from importlib.metadata import version

    # Without the build (`+cpu`, `+cu128`): images are resized on the CPU by the same code in either.
    return " ".join([ENGINE, *(f"{name}-{version(name).split('+')[0]}" for name in ("simplejpeg", "pillow", "torch"))])


def decode_for_evaluation(
    images: Sequence[memoryview], places: NDArray[np.int64], spec: InputSpec, out: NDArray[np.uint8]
) -> Faults:
    """The path that evaluation, prediction and serving share, image by image, into out[places]."""
    from vit_model.preprocess import ImageError, load_image

    faults: Faults = {}
    for data, place in zip(images, places.tolist(), strict=True):
        try:
            out[place] = load_image(bytes(data), spec).numpy()
        except ImageError as error:
            faults[place] = (error.reason, str(error))
    return faults


def decode_for_training(
    images: Sequence[memoryview],
    places: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    *,
    spec: InputSpec,
    augment: AugmentConfig,
    seed: int,
    epoch: int,
    out: NDArray[np.uint8],
) -> Faults:
    """Crop, resize and mirror each image into out[places]."""
    faults: Faults = {}
    plain: list[int] = []
    sources: list[_Source] = []
    slow: list[int] = []
    for i, data in enumerate(images):
        source = _open_plain(data, spec.channels)
        if source is None:
            slow.append(i)
        else:
            plain.append(i)
            sources.append(source)
    sizes = np.array([source.size for source in sources], np.int64).reshape(-1, 2)
    boxes = crop_boxes(augment, seed, epoch, sample_ids[plain], sizes[:, 0], sizes[:, 1])
    together: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}
    for i, source, box in zip(plain, sources, boxes.tolist(), strict=True):
        try:
            pixels = source.pixels(box, spec)
        except Exception:  # Whatever the decoder says, the reference path gives the verdict.
            slow.append(i)
            continue
        if pixels.size < TINY:
            together.setdefault(pixels.shape, []).append((int(places[i]), pixels))
        else:
            out[places[i]] = _resize(pixels[None], spec)[0]
    for group in together.values():
        out[[place for place, _ in group]] = _resize(np.stack([pixels for _, pixels in group]), spec)
    for i in slow:
        _decode_slowly(images[i], int(places[i]), sample_ids[i : i + 1], spec, augment, seed, epoch, out, faults)
    if augment.crop == "random" and augment.padding:
        _shift(out, places, shifts(augment, seed, epoch, sample_ids), augment.padding)
    mirrored = places[flips(augment, seed, epoch, sample_ids)]
    out[mirrored] = out[mirrored][..., ::-1]
    return faults


def _decode_slowly(
    data: memoryview,
    place: int,
    sample_id: NDArray[np.int64],
    spec: InputSpec,
    augment: AugmentConfig,
    seed: int,
    epoch: int,
    out: NDArray[np.uint8],
    faults: Faults,
) -> None:
    """One image through vit_model.preprocess; decoded pixels of only one such image are held at a time."""
    from vit_model.preprocess import ImageError, decode_image

    try:
        pixels = decode_image(bytes(data), spec.channels)  # (C, H, W)
    except ImageError as error:
        faults[place] = (error.reason, str(error))
        return
    height, width = pixels.shape[1:]
    boxes = crop_boxes(augment, seed, epoch, sample_id, np.array([width]), np.array([height]))
    x, y, width, height = boxes.tolist()[0]
    out[place] = _resize(pixels.numpy().transpose(1, 2, 0)[None, y : y + height, x : x + width], spec)[0]


class _Source(Protocol):
    """A plain image whose size is known and whose pixels are not yet decoded."""

    @property
    def size(self) -> tuple[int, int]: ...  # width, height

    def pixels(self, box: Box, spec: InputSpec) -> NDArray[np.uint8]: ...  # (h, w, C) of the box


def _open_plain(data: memoryview, channels: int) -> _Source | None:
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
    def __init__(self, data: memoryview, size: tuple[int, int]) -> None:
        self.data, self.size = data, size

    @classmethod
    def open(cls, data: memoryview) -> _JpegSource | None:
        import simplejpeg

        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "Gray", "RGB") or width * height > PLAIN_PIXELS or _has_exif(data):
            return None
        return cls(data, (width, height))

    def pixels(self, box: Box, spec: InputSpec) -> NDArray[np.uint8]:
        """Decodes at the smallest DCT scale that still has a pixel for every pixel of the model."""
        import simplejpeg

        x, y, width, height = box
        scale = next((s for s in DCT_SCALES if width >= s * spec.width and height >= s * spec.height), 1)
        least_width, least_height = (-(-side // scale) for side in self.size)
        decoded = simplejpeg.decode_jpeg(self.data, "RGB", min_height=least_height, min_width=least_width)
        # A scaled box is widened to whole pixels.
        right, bottom = -(-(x + width) // scale), -(-(y + height) // scale)
        pixels: NDArray[np.uint8] = decoded[y // scale : bottom, x // scale : right]
        return pixels


class _PngSource:
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

    def pixels(self, box: Box, spec: InputSpec) -> NDArray[np.uint8]:
        x, y, width, height = box
        pixels = np.asarray(self.image)[y : y + height, x : x + width]
        return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], self.channels, axis=2)


def _has_exif(data: memoryview) -> bool:
    """Whether an APP1 Exif segment stands before the image data."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xE1 and bytes(data[at + 4 : at + 8]) == b"Exif":
            return True
        if marker == 0xDA:  # Start of scan.
            return False
        at += 2 + length
    return False


def _resize(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
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


def _shift(out: NDArray[np.uint8], places: NDArray[np.int64], offsets: NDArray[np.int64], padding: int) -> None:
    """Move each image by its offset inside a black border."""
    padded = np.pad(out[places], ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, out.shape[2:], axis=(2, 3))
    out[places] = windows[np.arange(len(places)), :, offsets[:, 0], offsets[:, 1]]
