"""The short way for plain files gives the reference path's pixels, and a bad image harms only itself."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.reader import native
from pipelines.reader.augment import AugmentConfig
from pipelines.reader.decode import EngineName, Faults, decode_for_training
from vit_model.preprocess import InputSpec, load_image

from .conftest import picture

PLAIN = AugmentConfig(crop="none", flip=False)
GREY = InputSpec(channels=1, height=40, width=48, mean=(0.5,), std=(0.5,))
COLOUR = InputSpec(height=40, width=48)


def encoded(mode: str, kind: str, size: tuple[int, int] = (70, 61), **options: Any) -> bytes:
    image = Image.open(io.BytesIO(picture(3, size, mode="RGB"))).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_jpeg(png: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("RGB", "JPEG", exif=exif)


def turned_by_xmp() -> bytes:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return encoded("RGB", "JPEG", xmp=xmp)


def upright_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "a camera"
    return encoded("RGB", "JPEG", exif=exif)


FILES = {
    "jpeg": encoded("RGB", "JPEG"),
    "4:4:4 jpeg": encoded("RGB", "JPEG", subsampling=0),
    "4:2:2 jpeg": encoded("RGB", "JPEG", subsampling=1),
    "jpeg with restarts": encoded("RGB", "JPEG", restart_marker_blocks=3),
    "narrow jpeg": encoded("RGB", "JPEG", size=(3, 40)),
    "jpeg turned by xmp": turned_by_xmp(),
    "jpeg with exif": upright_exif(),
    "grey jpeg": encoded("L", "JPEG"),
    "progressive jpeg": encoded("RGB", "JPEG", progressive=True),
    "cmyk jpeg": encoded("CMYK", "JPEG"),
    "rotated jpeg": rotated(),
    "png": encoded("RGB", "PNG"),
    "grey png": encoded("L", "PNG"),
    "bilevel png": encoded("1", "PNG"),
    "palette png": encoded("P", "PNG"),
    "alpha png": encoded("RGBA", "PNG"),
    "16 bit png": encoded("I;16", "PNG"),
    "transparent grey png": encoded("L", "PNG", transparency=100),
    "png of the right size": encoded("RGB", "PNG", size=(48, 40)),
    "webp": encoded("RGB", "WEBP"),
    "one pixel": encoded("RGB", "PNG", size=(1, 1)),
}


ENGINES = [
    "wheels",
    pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason=f"not built: {native.why_not()}")),
]


ENGINE: EngineName = "wheels"


@pytest.fixture(params=ENGINES, autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in this file holds for both."""
    monkeypatch.setattr(f"{__name__}.ENGINE", request.param)


def decoded(
    files: list[bytes], spec: InputSpec, augment: AugmentConfig = PLAIN, epoch: int = 0
) -> tuple[NDArray[np.uint8], Faults]:
    out = np.zeros((len(files), spec.channels, spec.height, spec.width), np.uint8)
    places = np.arange(len(files))
    views = [memoryview(data) for data in files]
    faults = decode_for_training(
        views, places, places + 100, spec=spec, augment=augment, seed=1, epoch=epoch, out=out, engine=ENGINE
    )
    return out, faults


@pytest.mark.parametrize("spec", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("name", FILES)
def test_an_uncropped_image_has_the_pixels_of_the_reference_path(name: str, spec: InputSpec) -> None:
    out, faults = decoded([FILES[name]], spec)
    assert not faults
    assert (out[0] == load_image(FILES[name], spec).numpy()).all()


@pytest.mark.parametrize("crop", ["inception", "random", "none"])
def test_images_together_have_the_pixels_of_each_alone(crop: Any) -> None:
    small = [picture(i, (28, 28)) for i in range(20)]
    files = [*FILES.values(), *small, *map(as_jpeg, small)]
    together, faults = decoded(files, COLOUR, AugmentConfig(crop=crop))
    assert not faults
    for i, data in enumerate(files):
        out = np.zeros((1, 3, 40, 48), np.uint8)
        decode_for_training(
            [memoryview(data)],
            np.array([0]),
            np.array([i + 100]),
            spec=COLOUR,
            augment=AugmentConfig(crop=crop),
            seed=1,
            epoch=0,
            out=out,
            engine=ENGINE,
        )
        assert (out[0] == together[i]).all()


def test_a_large_jpeg_decoded_small_looks_like_the_whole() -> None:
    data = encoded("RGB", "JPEG", size=(800, 640), quality=95)
    out, _ = decoded([data], COLOUR)
    difference = out[0].astype(float) - load_image(data, COLOUR).numpy()
    assert np.abs(difference).mean() < 2


def test_a_mirrored_image_is_the_same_image_mirrored() -> None:
    files = [FILES["jpeg"]] * 30
    straight, _ = decoded(files, COLOUR)
    out, _ = decoded(files, COLOUR, AugmentConfig(crop="none"))
    mirrored = [(image == plain[..., ::-1]).all() for image, plain in zip(out, straight, strict=True)]
    unchanged = [(image == plain).all() for image, plain in zip(out, straight, strict=True)]
    assert all(m != u for m, u in zip(mirrored, unchanged, strict=True))
    assert 5 < sum(mirrored) < 25


def test_a_shifted_image_keeps_its_content_inside_a_black_border() -> None:
    white = io.BytesIO()
    Image.new("L", (48, 40), 255).save(white, "PNG")
    out, _ = decoded([white.getvalue()] * 50, GREY, AugmentConfig(crop="random", padding=3))
    for image in out[:, 0]:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert 37 <= len(rows) <= 40
        assert 45 <= len(columns) <= 48
        assert (image[np.ix_(rows, columns)] == 255).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image", "unknown_format"),
        (FILES["png"][:-200], "undecodable"),
        (FILES["jpeg"][: len(FILES["jpeg"]) // 2], "undecodable"),
        (FILES["webp"][:100], "undecodable"),
        (FILES["png"][:30], "undecodable"),
        (FILES["jpeg"][:20], "undecodable"),
    ],
)
@pytest.mark.parametrize("crop", ["inception", "none"])
def test_a_bad_image_is_named_and_its_neighbours_are_whole(data: bytes, reason: str, crop: Any) -> None:
    config = AugmentConfig(crop=crop)
    out, faults = decoded([FILES["jpeg"], data, FILES["png"]], COLOUR, config)
    assert {place: found for place, (found, _) in faults.items()} in ({1: reason}, {1: "unknown_format"})
    whole, _ = decoded([FILES["jpeg"], FILES["jpeg"], FILES["png"]], COLOUR, config)
    assert (out[[0, 2]] == whole[[0, 2]]).all()
