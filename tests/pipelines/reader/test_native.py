"""The C decoder gives the pixels of simplejpeg and torch, bit for bit, and leaves to others what it does not know."""

from __future__ import annotations

import io
import shutil
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFile

from pipelines.reader import native
from vit_model.preprocess import InputSpec

if native.why_not():
    # The failure of an optional extension is silent: where it could have been built, it must be here.
    can_build = shutil.which("cc") and (Path(sysconfig.get_path("include")) / "Python.h").exists()
    assert not can_build, f"the native decoder is missing ({native.why_not()}); pip install -e . -v shows why"
    pytest.skip(f"not built: {native.why_not()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def room_for_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 22)  # Pillow's buffer is too small for noise at quality 100.


def pixels(rng: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    kind = rng.integers(3)
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    waves = (127 + 90 * np.sin(x / 7 + rng.random() * 6) * np.cos(y / 9))[..., None]
    if kind == 1:
        return (waves + rng.normal(0, rng.choice([0, 3, 20]), (height, width, 3))).clip(0, 255).astype(np.uint8)
    flat = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    flat[height // 3 :, width // 2 :] = rng.integers(0, 256, 3)
    return flat


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    options: dict[str, object] = {"quality": int(rng.choice([5, 30, 75, 90, 95, 100])), "optimize": rng.random() < 0.4}
    if rng.random() < 0.4:
        options["restart_marker_blocks"] = int(rng.integers(1, 40))
    mode = "L" if rng.random() < 0.2 else "RGB"
    if mode == "RGB":
        options["subsampling"] = int(rng.integers(0, 3))
    file = io.BytesIO()
    Image.fromarray(pixels(rng, width, height)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def reference(data: bytes, crop: NDArray[np.int32], spec: InputSpec) -> NDArray[np.uint8]:
    scale, x, y, width, height, flip = crop.tolist()
    full_height, full_width, _, _ = simplejpeg.decode_jpeg_header(data)
    whole = simplejpeg.decode_jpeg(data, min_height=-(-full_height // scale), min_width=-(-full_width // scale))
    box = torch.from_numpy(np.ascontiguousarray(whole[y : y + height, x : x + width])).permute(2, 0, 1)[None]
    size = (spec.height, spec.width)
    resized: NDArray[np.uint8] = F.interpolate(box, size=size, mode=spec.interpolation, antialias=True)[0].numpy()
    return resized[..., ::-1] if flip else resized


def cases(seed: int, count: int) -> Iterator[tuple[bytes, NDArray[np.int32], InputSpec]]:
    """Any size, kind, scale, crop, flip and output."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        most = int(rng.choice([20, 300]))
        width, height = (int(side) for side in rng.integers(1, most, 2))
        scale = int(rng.choice([1, 1, 2, 4, 8])) if min(width, height) > 70 else 1
        shown = -(-width // scale), -(-height // scale)
        x, y = (int(rng.integers(0, side)) for side in shown)
        box = [x, y, *(int(rng.integers(1, side - at + 1)) for side, at in zip(shown, (x, y), strict=True))]
        if rng.random() < 0.2:
            box = [0, 0, *shown]
        spec = InputSpec(
            height=int(rng.integers(1, 100)),
            width=int(rng.integers(1, 100)),
            interpolation="bicubic" if rng.random() < 0.3 else "bilinear",
        )
        yield jpeg(rng, width, height), np.array([scale, *box, rng.integers(2)], np.int32), spec


def decoded(
    data: bytes, crop: NDArray[np.int32], spec: InputSpec, *, simd: bool = True
) -> tuple[NDArray[np.uint8], int]:
    out = np.full((1, 3, spec.height, spec.width), 77, np.uint8)
    status = native.decode([memoryview(data)], crop[None], np.zeros(1, np.int64), out, spec, simd=simd)
    return out[0], int(status[0])


@pytest.mark.parametrize("simd", [True, False], ids=["vector", "scalar"])
def test_pixels_are_those_of_simplejpeg_and_torch(simd: bool) -> None:
    for data, crop, spec in cases(seed=3, count=300):
        out, status = decoded(data, crop, spec, simd=simd)
        assert status == 0, (crop, spec)
        assert (out == reference(data, crop, spec)).all(), (crop, spec)


WHOLE = np.array([1, 0, 0, 64, 48, 0], np.int32)
SPEC = InputSpec(height=24, width=32)
GOOD = jpeg(np.random.default_rng(1), 64, 48)


def saved(mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(np.random.default_rng(2), 64, 48)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
        GOOD + b"\0",
        saved(progressive=True),
        saved("CMYK"),
        saved(exif=b"Exif\0\0broken"),
        saved()[:200] + b"\xff\xd9",
        saved(restart_marker_blocks=1).replace(b"\xff\xd1", b"\xff\xd5"),
    ],
)
def test_what_is_not_plain_or_damaged_is_left_to_others(data: bytes) -> None:
    _, status = decoded(data, WHOLE, SPEC)
    assert status in (1, 2)


def test_damage_anywhere_never_harms_a_neighbour() -> None:
    """Bytes overwritten, removed and doubled: a status or pixels, and the next image in the call is whole."""
    rng = np.random.default_rng(4)
    whole, _ = decoded(GOOD, WHOLE, SPEC)
    seen = set()
    for _ in range(400):
        data = bytearray(GOOD)
        at = int(rng.integers(len(data)))
        match rng.integers(3):
            case 0:
                data[at] = int(rng.integers(256))
            case 1:
                del data[at : at + int(rng.integers(1, 40))]
            case _:
                data[at:at] = data[at : at + int(rng.integers(1, 40))]
        out = np.zeros((2, 3, 24, 32), np.uint8)
        files = [memoryview(bytes(data)), memoryview(GOOD)]
        status = native.decode(files, np.stack([WHOLE, WHOLE]), np.arange(2), out, SPEC)
        seen.add(int(status[0]))
        assert status[1] == 0
        assert (out[1] == whole).all()
    assert {0, 2} <= seen


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5), (60, 0, 5, 5), (0, 48, 1, 1), (-1, 0, 5, 5), (0, 0, 2**31 - 1, 1), (2**31 - 1, 0, 1, 1)]
)
def test_a_crop_outside_the_image_is_refused(box: tuple[int, int, int, int]) -> None:
    assert decoded(GOOD, np.array([1, *box, 0], np.int32), SPEC)[1] == 4


def test_wrong_arguments_raise() -> None:
    out = np.zeros((1, 3, 24, 32), np.uint8)
    crops, places = WHOLE[None], np.zeros(1, np.int64)
    files = [memoryview(GOOD)]
    with pytest.raises(ValueError, match="crops has"):
        native.decode(files, crops[:, :5].copy(), places, out, SPEC)
    with pytest.raises(IndexError, match="outside out"):
        native.decode(files, crops, places + 1, out, SPEC)
    with pytest.raises(ValueError, match="scale 3"):
        native.decode(files, crops * 3, places, out, SPEC)
    with pytest.raises(ValueError, match="no whole images"):
        native.decode(files, crops, places, out[..., :31].copy(), SPEC)
    out.flags.writeable = False
    with pytest.raises(TypeError, match="read-write"):
        native.decode(files, crops, places, out, SPEC)


def test_other_threads_run_while_a_page_is_decoded() -> None:
    data = memoryview(jpeg(np.random.default_rng(8), 290, 290))
    crops = np.repeat(np.array([[1, 0, 0, 290, 290, 0]], np.int32), 300, axis=0)
    out = np.zeros((1, 3, 224, 224), np.uint8)
    page = threading.Thread(target=native.decode, args=([data] * 300, crops, np.zeros(300, np.int64), out, InputSpec()))
    started = last = time.perf_counter()
    longest = 0.0
    page.start()
    while page.is_alive():
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert longest < 0.7 * (time.perf_counter() - started)
