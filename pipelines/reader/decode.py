"""Image bytes to the pixels of a batch, by the engine that the run has chosen (`pipelines.reader.engines`).

`native` decodes plain JPEGs in C, a page of images in one call; `wheels` decodes plain JPEGs and PNGs image by image;
`vit_model.preprocess`, the reference path, decodes the rest and gives the verdict on whatever failed. All three crop
by the same numbers and give a whole image the same pixels. On a damaged one they may differ: `native` looks at no block
below the crop. `nvjpeg` takes the same crops on a GPU, with pixels of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.reader import native, nvjpeg, wheels
from pipelines.reader.augment import AugmentConfig, crop_boxes, dct_crops, flips, shifts

if TYPE_CHECKING:
    from vit_model.preprocess import InputSpec

__all__ = ["DecoderError", "EngineName", "Faults", "decode_for_evaluation", "decode_for_training"]

EngineName = Literal["wheels", "native", "nvjpeg"]
Faults = dict[int, tuple[str, str]]  # place -> (reason, text)


class DecoderError(RuntimeError):
    """A decoder failed in a way that says nothing about the file: a fault of the program, at `place`."""

    def __init__(self, place: int, error: Exception) -> None:
        super().__init__(f"the decoder failed with {type(error).__name__}: {error}")
        self.place = place


TINY = 1 << 14  # Bytes. Below, the call that resizes costs more than its work, and images of one size share it.


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
        except Exception as error:
            raise DecoderError(place, error) from error
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
    engine: EngineName = "wheels",
) -> Faults:
    """Crop, resize and mirror each image into out[places]."""
    work = _Work(images, places, sample_ids, spec, augment, seed, epoch, out)
    mirrored = flips(augment, seed, epoch, sample_ids)
    is_shifted = augment.crop == "random" and augment.padding > 0
    at_once = np.zeros_like(mirrored) if is_shifted else mirrored  # An image is shifted first, then mirrored.
    todo = np.arange(len(images))
    if engine == "native" and native.serves(spec):
        todo = _decode_natively(work, todo, at_once)
    elif engine == "nvjpeg" and spec.channels == 3:
        todo = _decode_on_gpu(work, todo, at_once)
    todo = _decode_with_wheels(work, todo, at_once)
    faults = _decode_slowly(work, todo, at_once)
    if is_shifted:
        _shift(out, places, shifts(augment, seed, epoch, sample_ids), augment.padding)
        turned = places[mirrored]
        out[turned] = out[turned][..., ::-1]
    return faults


@dataclass(frozen=True, slots=True)
class _Work:
    images: Sequence[memoryview]
    places: NDArray[np.int64]
    sample_ids: NDArray[np.int64]
    spec: InputSpec
    augment: AugmentConfig
    seed: int
    epoch: int
    out: NDArray[np.uint8]

    def crops(
        self, which: NDArray[np.int64], sizes: NDArray[np.int64], has_scales: NDArray[np.bool_] | Literal[True]
    ) -> NDArray[np.int64]:
        """(n, 5) scale, x, y, width, height of the images `which`, whose sizes (n, 2) are width and height."""
        boxes = crop_boxes(self.augment, self.seed, self.epoch, self.sample_ids[which], sizes[:, 0], sizes[:, 1])
        return dct_crops(boxes, self.spec.width, self.spec.height, has_scales)

    def put(self, i: int, pixels: NDArray[np.uint8], mirrored: NDArray[np.bool_]) -> None:
        """A resized image (C, H, W)."""
        self.out[self.places[i]] = pixels[..., ::-1] if mirrored[i] else pixels


# Each takes the images that are still to do, and returns those that it leaves to the next.


def _decode_natively(work: _Work, todo: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> NDArray[np.int64]:
    sizes = native.read_sizes(work.images).astype(np.int64)
    is_left = sizes[:, 0] == 0
    plain = todo[~is_left]
    if len(plain):
        crops = np.column_stack([work.crops(plain, sizes[plain], True), mirrored[plain]]).astype(np.int32)
        images = [work.images[i] for i in plain.tolist()]
        is_left[plain] = native.decode(images, crops, work.places[plain], work.out, work.spec) != 0
    return np.flatnonzero(is_left)


def _decode_on_gpu(work: _Work, todo: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> NDArray[np.int64]:
    sources = [wheels.open_plain(image, work.spec.channels) for image in work.images]
    is_plain = np.array([source is not None and source.has_scales for source in sources], np.bool_)  # An upright JPEG.
    plain, left = todo[is_plain], todo[~is_plain].tolist()
    sizes = np.array([source.size for source in sources if source is not None and source.has_scales], np.int64)
    boxes = work.crops(plain, sizes.reshape(-1, 2), np.zeros(len(plain), np.bool_))[:, 1:]
    found = nvjpeg.decode([work.images[i] for i in plain.tolist()], boxes, work.spec)
    for i, pixels in zip(plain.tolist(), found, strict=True):
        if pixels is None:
            left.append(i)
        else:
            work.put(i, pixels, mirrored)
    return np.array(sorted(left), np.int64)


def _decode_with_wheels(work: _Work, todo: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> NDArray[np.int64]:
    left: list[int] = []
    plain: list[int] = []
    sources: list[wheels.Source] = []
    for i in todo.tolist():
        source = wheels.open_plain(work.images[i], work.spec.channels)
        if source is None:
            left.append(i)
        else:
            plain.append(i)
            sources.append(source)
    sizes = np.array([source.size for source in sources], np.int64).reshape(-1, 2)
    has_scales = np.array([source.has_scales for source in sources], np.bool_)
    crops = work.crops(np.array(plain, np.int64), sizes, has_scales)
    together: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}
    for i, source, crop in zip(plain, sources, crops.tolist(), strict=True):
        try:
            pixels = source.pixels(tuple(crop))
        except Exception:  # Whatever the decoder says, the reference path gives the verdict.
            left.append(i)
            continue
        if pixels.size < TINY:
            together.setdefault(pixels.shape, []).append((i, pixels))
        else:
            work.put(i, wheels.resize(pixels[None], work.spec)[0], mirrored)
    for group in together.values():
        members = np.array([i for i, _ in group])
        work.out[work.places[members]] = wheels.resize(np.stack([pixels for _, pixels in group]), work.spec)
        turned = work.places[members[mirrored[members]]]
        work.out[turned] = work.out[turned][..., ::-1]
    return np.array(left, np.int64)


def _decode_slowly(work: _Work, todo: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Faults:
    """Through vit_model.preprocess; decoded pixels of only one such image are held at a time."""
    from vit_model.preprocess import ImageError, decode_image

    faults: Faults = {}
    for i in todo.tolist():
        try:
            pixels = decode_image(bytes(work.images[i]), work.spec.channels)  # (C, H, W)
            size = np.array([pixels.shape[:0:-1]], np.int64)
            _, x, y, width, height = work.crops(np.array([i]), size, np.zeros(1, np.bool_)).tolist()[0]
            crop = pixels.numpy().transpose(1, 2, 0)[None, y : y + height, x : x + width]
            work.put(i, wheels.resize(crop, work.spec)[0], mirrored)
        except ImageError as error:
            faults[int(work.places[i])] = (error.reason, str(error))
        except Exception as error:
            raise DecoderError(int(work.places[i]), error) from error
    return faults


def _shift(out: NDArray[np.uint8], places: NDArray[np.int64], offsets: NDArray[np.int64], padding: int) -> None:
    """Move each image by its offset inside a black border."""
    padded = np.pad(out[places], ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, out.shape[2:], axis=(2, 3))
    out[places] = windows[np.arange(len(places)), :, offsets[:, 0], offsets[:, 1]]
