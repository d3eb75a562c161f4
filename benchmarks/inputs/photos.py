"""Class folders of JPEG photos as large as ImageNet's: about 110 KB each, made from the two photos of scikit-learn.

A few hundred distinct photos are cut, coloured, given sensor noise and encoded; copies of them differ by a comment
segment, so that a gigabyte is written in seconds and no two files are equal.
"""

from __future__ import annotations

import io
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

__all__ = ["make_photos", "write_folders"]

# (width, height, share): the common sizes of ImageNet; the rest is spread around 400x350.
SIZES = ((500, 375, 0.28), (500, 333, 0.12), (375, 500, 0.1), (333, 500, 0.06), (500, 500, 0.06), (640, 480, 0.04))
QUALITIES = ((85, 0.06), (90, 0.28), (92, 0.2), (95, 0.28), (96, 0.18))


@cache
def make_photos(count: int, seed: int = 0) -> list[bytes]:
    """Distinct JPEG photos."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    return [_photo(photos[int(rng.integers(len(photos)))], rng) for _ in range(count)]


def _photo(photo: Image.Image, rng: np.random.Generator) -> bytes:
    width, height = _size(rng)
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.55, 1.0)
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    cut = photo.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        cut = change(cut).enhance(rng.uniform(0.75, 1.25))
    # A reduced photo is smoother than one from a camera: noise gives the encoder its usual work back.
    noise = rng.normal(0, rng.uniform(3, 9), (height, width, 1)) + rng.normal(0, 1.5, (height, width, 3))
    pixels = np.clip(np.asarray(cut, np.float32) + noise, 0, 255).astype(np.uint8)
    values, shares = zip(*QUALITIES, strict=True)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.choice(values, p=shares)), subsampling=2)
    return file.getvalue()


def _size(rng: np.random.Generator) -> tuple[int, int]:
    chance = rng.random()
    for width, height, share in SIZES:
        if chance < share:
            return width, height
        chance -= share
    aspect, area = np.exp(rng.normal(0, 0.3)), np.exp(rng.normal(np.log(400 * 350), 0.6))
    return tuple(int(np.clip((area * ratio) ** 0.5, 100, 900)) for ratio in (aspect, 1 / aspect))  # type: ignore[return-value]


def numbered(photo: bytes, number: int) -> bytes:
    """The photo with its number in a comment segment after the start marker: other bytes, the same picture."""
    text = b"%012d" % number
    return photo[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + photo[2:]


def write_folders(folder: Path, total_bytes: int, *, distinct: int = 400, classes: int = 10, **options: Any) -> int:
    """Fill class folders until they hold `total_bytes`; returns the number of files, which are always the same."""
    photos = make_photos(distinct, **options)
    for name in range(classes):
        (folder / f"class-{name:02d}").mkdir(parents=True, exist_ok=True)
    written = number = 0
    while written < total_bytes:
        data = numbered(photos[number % distinct], number)
        (folder / f"class-{number % classes:02d}" / f"{number:08d}.jpg").write_bytes(data)
        written += len(data)
        number += 1
    return number
