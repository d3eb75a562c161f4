from __future__ import annotations

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.corpus.checks import is_whole_jpeg
from pipelines.corpus.images import MAX_FILE_BYTES, MAX_PIXELS, ImageRejected, inspect_image
from pipelines.corpus.quarantine import NOTES, REASONS

from .inputs import animation, picture, png_header

KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
MODES = [
    ("JPEG", "L", ()),
    ("JPEG", "RGB", ()),
    ("JPEG", "CMYK", ("cmyk",)),
    ("PNG", "1", ()),
    ("PNG", "L", ()),
    ("PNG", "P", ()),
    ("PNG", "LA", ("alpha",)),
    ("PNG", "RGBA", ("alpha",)),
    ("PNG", "I;16", ("16bit",)),
    ("WEBP", "RGB", ()),
    ("WEBP", "RGBA", ("alpha",)),
]


@pytest.mark.parametrize("kind, mode, notes", MODES)
@pytest.mark.parametrize("size", [(1, 1), (13, 7), (300, 200)])
def test_format_size_and_oddities_are_read_from_the_header(
    kind: str, mode: str, notes: tuple[str, ...], size: tuple[int, int]
) -> None:
    facts = inspect_image(picture(1, size, kind, mode))
    assert (facts.extension, facts.width, facts.height) == (KINDS[kind], *size)
    assert facts.notes == notes and set(notes) <= NOTES.keys()


@pytest.mark.parametrize("options", [{"progressive": True}, {"lossless": True}, {"quality": 10}, {"subsampling": 0}])
@pytest.mark.parametrize("kind", KINDS)
def test_encoder_options_change_nothing(kind: str, options: dict[str, object]) -> None:
    facts = inspect_image(picture(3, (33, 21), kind, **options))
    assert (facts.width, facts.height, facts.notes) == (33, 21, ())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_width_and_height_are_those_that_are_shown(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    facts = inspect_image(picture(1, (20, 10), kind, exif=exif))
    assert (facts.width, facts.height) == ((10, 20) if orientation > 4 else (20, 10))
    assert facts.notes == (("exif_rotated",) if orientation > 1 else ())


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_of_a_file_is_noticed(kind: str) -> None:
    data = picture(1, (40, 30), kind)
    for end in range(len(data)):
        with pytest.raises(ImageRejected) as caught:
            inspect_image(data[:end])
        assert caught.value.reason in ({"empty"} if end == 0 else {"truncated", "not_an_image"}), (end, caught.value)


def test_bytes_after_the_end_are_no_harm() -> None:
    assert inspect_image(picture(1, kind="JPEG") + b"\0" * 999).extension == "jpg"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"hello, this is a README", "not_an_image"),
        (b"<html>404</html>", "not_an_image"),
        (picture(1, kind="GIF"), "unsupported_format"),
        (picture(1, kind="BMP"), "unsupported_format"),
        (picture(1, kind="TIFF"), "unsupported_format"),
        (animation("PNG"), "animated"),
        (animation("WEBP"), "animated"),
        (png_header(20_000, 20_000), "bomb"),
        (png_header(0, 7), "zero_size"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "corrupt"),
        (b"\xff\xd8\xff\xd9", "corrupt"),
    ],
)
def test_a_bad_file_is_rejected_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageRejected) as caught:
        inspect_image(data)
    assert caught.value.reason == reason and reason in REASONS


@given(st.sampled_from(list(KINDS)), st.integers(0, 2**32), st.integers(1, 12))
def test_damaged_headers_end_in_a_reason_and_never_in_another_error(kind: str, seed: int, flips: int) -> None:
    data = bytearray(picture(1, (9, 8), kind))
    rng = random.Random(seed)
    for _ in range(flips):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        facts = inspect_image(bytes(data))
    except ImageRejected as rejected:
        assert rejected.reason in REASONS
    else:
        assert facts.width * facts.height <= MAX_PIXELS


def test_what_is_let_in_can_be_read_by_the_shared_decoder() -> None:
    from vit_model import decode

    assert MAX_PIXELS <= decode.MAX_PIXELS and MAX_FILE_BYTES <= decode.MAX_BYTES
    for kind, mode, _ in MODES:
        data = picture(5, (17, 11), kind, mode)
        facts = inspect_image(data)
        assert tuple(decode.decode_image(data, 3).shape) == (3, facts.height, facts.width)
        assert Image.open(io.BytesIO(data)).size == (facts.width, facts.height)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_quick_look_at_a_plain_jpeg_says_what_the_shared_decoder_says(
    mode: str, options: dict[str, object]
) -> None:
    from vit_model.preprocess import ImageError, decode_image

    file = io.BytesIO()
    picture_of_noise(mode).save(file, "JPEG", quality=85, **options)
    rng = random.Random(0)
    agreed = {True: 0, False: 0}
    for _ in range(1500):
        data = damaged(file.getvalue(), rng)
        try:
            if not inspect_image(data).is_plain:
                continue
        except ImageRejected:
            continue
        try:
            decode_image(data, 3)
            is_whole = True
        except ImageError:
            is_whole = False
        assert is_whole_jpeg(data) == is_whole
        agreed[is_whole] += 1
    assert min(agreed.values()) > 100


def picture_of_noise(mode: str) -> Image.Image:
    return Image.frombytes("RGB", (37, 45), random.Random(1).randbytes(37 * 45 * 3)).convert(mode)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut and ended, some bytes changed, some left out, or the header touched."""
    at = rng.randrange(2, len(data))
    match rng.randrange(4):
        case 0:
            return data[:at] + b"\xff\xd9"
        case 1:
            return data[:at] + rng.randbytes(2) + data[at + 2 :]
        case 2:
            return data[:at] + data[at + rng.randrange(1, 9) :]
    at = rng.randrange(2, 600)
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def test_a_jpeg_with_exif_or_a_profile_is_not_plain() -> None:
    file = io.BytesIO()
    picture_of_noise("RGB").save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    assert not inspect_image(file.getvalue()).is_plain
    picture_of_noise("RGB").save(file := io.BytesIO(), "JPEG", icc_profile=b"profile")
    assert not inspect_image(file.getvalue()).is_plain
    picture_of_noise("RGB").convert("CMYK").save(file := io.BytesIO(), "JPEG")
    assert not inspect_image(file.getvalue()).is_plain
