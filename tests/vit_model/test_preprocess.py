"""The one path from bytes to the model's tensor, rule by rule."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vit_model import ImageError, InputSpec, OutputSpec, decode_image, load_image, normalize

RNG = np.random.default_rng(0)
PHOTO = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((36, 24), Image.Resampling.BICUBIC)
)


def encode(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data, channels=3):
    return decode_image(data, channels).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(format):
    assert np.array_equal(pixels(encode(PHOTO, format, **({"lossless": True} if format == "WEBP" else {}))), PHOTO)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_a_jpeg_has_the_pixels_that_pillow_gives(options, channels):
    data = encode(PHOTO, "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
    assert np.array_equal(pixels(data, channels).squeeze(), expected)


def test_grey_pictures_fill_three_channels_and_colour_is_reduced_by_luma():
    grey = PHOTO[:, :, 0]
    assert np.array_equal(pixels(encode(grey)), np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(pixels(encode(PHOTO), 1)[:, :, 0], np.asarray(Image.fromarray(PHOTO).convert("L")))
    assert pixels(encode(grey, "JPEG")).shape == (24, 36, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, format):
    from PIL import ImageOps

    image = Image.fromarray(PHOTO)
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encode(image, format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(pixels(data), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1, 30), (30, 1), (1, 1)])
def test_a_picture_of_one_pixel_in_width_is_turned_like_any_other(size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    found = pixels(encode(image, exif=exif))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(image, exif=exif))))
    assert (found == np.array(turned)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_rotated_tiff_is_turned_once(orientation, compression):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encode(PHOTO, "TIFF", tiffinfo={0x0112: orientation}, compression=compression)
    assert np.array_equal(pixels(turned), pixels(encode(PHOTO, exif=exif)))


def test_alpha_lies_over_white():
    alpha = np.zeros((24, 36, 4), np.uint8)
    alpha[..., :3] = PHOTO
    alpha[:12, :, 3] = 255
    result = pixels(encode(alpha))
    assert np.array_equal(result[:12], PHOTO[:12])
    assert (result[12:] == 255).all()
    palette = Image.fromarray(PHOTO).quantize(8)
    transparent = pixels(encode(palette, "PNG", transparency=0))
    assert (transparent[np.asarray(palette) == 0] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_keeps_its_whole_range(channels):
    deep = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
    expected = np.floor(deep.astype(float) * 255 / 65535 + 0.5)
    assert np.array_equal(pixels(encode(deep), channels)[:, :, 0], expected)


def test_bilevel_palette_and_cmyk_are_converted():
    bilevel = Image.fromarray(PHOTO).convert("1")
    assert set(np.unique(pixels(encode(bilevel)))) == {0, 255}
    palette = Image.fromarray(PHOTO).quantize(16)
    assert np.array_equal(pixels(encode(palette)), np.asarray(palette.convert("RGB")))
    cmyk = encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95)
    assert np.array_equal(pixels(cmyk), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is no picture at all", "unknown_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown_format"),
        (encode(PHOTO, "JPEG")[:300], "undecodable"),
        (encode(PHOTO, "JPEG")[:-40], "undecodable"),
        (encode(PHOTO)[:-60], "undecodable"),
        (encode(PHOTO.astype(np.float32)[:, :, 0], "TIFF"), "unsupported_mode"),
        (encode(PHOTO.astype(np.int32)[:, :, 0], "TIFF"), "unsupported_mode"),
        (encode(Image.merge("LAB", Image.fromarray(PHOTO).split()), "TIFF"), "unsupported_mode"),
    ],
)
def test_what_cannot_be_used_says_why_in_one_word(data, reason):
    with pytest.raises(ImageError) as caught:
        decode_image(data, 3)
    assert caught.value.reason == reason
    assert pickle.loads(pickle.dumps(caught.value)).reason == reason


def test_a_damaged_tiff_tag_is_an_undecodable_picture(monkeypatch):
    """Pillow lets a TypeError out where a tag has another type than it expects."""
    data = encode(Image.new("RGB", (9, 7)), "TIFF", compression="raw")

    def fail(*_):
        raise TypeError("'IFDRational' object cannot be interpreted as an integer")

    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", fail)
    with pytest.raises(ImageError, match="IFDRational") as caught:
        decode_image(data, 3)
    assert caught.value.reason == "undecodable"


def test_limits_hold_before_a_pixel_is_decoded():
    with pytest.raises(ImageError, match="36x24 px; the limit is 500 pixels") as caught:
        decode_image(encode(PHOTO), 3, max_pixels=500)
    assert caught.value.reason == "too_many_pixels"
    with pytest.raises(ImageError, match="the limit is 100") as caught:
        decode_image(encode(PHOTO), 3, max_bytes=100)
    assert caught.value.reason == "too_many_bytes"
    bomb = encode(Image.new("1", (15_000, 15_000)))
    assert len(bomb) < 1_000_000
    with pytest.raises(ImageError) as caught:
        decode_image(bomb, 3)
    assert caught.value.reason == "too_many_pixels"


def test_a_thread_of_pixels_is_not_blown_up():
    spec = InputSpec(height=384, width=384, resize="shorter_side", resize_to=448)
    with pytest.raises(ImageError, match="becomes 448x26880000") as caught:
        load_image(encode(Image.new("RGB", (60_000, 1))), spec)
    assert caught.value.reason == "too_many_pixels"
    assert load_image(encode(Image.new("RGB", (200, 1))), spec).shape == (3, 384, 384)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_end_in_pixels_or_in_an_image_error(seed):
    rng = np.random.default_rng(seed)
    data = bytearray(encode(PHOTO, ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"][seed % 6]))
    for place in rng.integers(0, len(data), 12):
        data[place] = rng.integers(0, 256)
    try:
        assert decode_image(bytes(data), 3).dtype == torch.uint8
    except ImageError as error:
        assert error.reason


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_square_resize_is_torchs_on_uint8(interpolation, antialias):
    spec = InputSpec(height=10, width=14, interpolation=interpolation, antialias=antialias)
    image = load_image(encode(PHOTO), spec)
    assert image.shape == (3, 10, 14)
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(PHOTO.copy()).permute(2, 0, 1)[None].float(),
        size=(10, 14),
        mode=interpolation,
        antialias=antialias,
        align_corners=False,
    )
    assert (image.float() - exact[0].clamp(0, 255)).abs().max() <= 1.01


def test_bilinear_with_antialias_is_pillows():
    image = load_image(encode(PHOTO), InputSpec(height=10, width=14)).permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(PHOTO).resize((14, 10), Image.Resampling.BILINEAR))
    assert np.abs(image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (30, 30), (5, 300)])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(shape):
    spec = InputSpec(height=16, width=16, resize="shorter_side", resize_to=18)
    ramp = np.broadcast_to(np.linspace(0, 255, shape[1])[None, :, None], (*shape, 3)).astype(np.uint8)
    image = load_image(encode(np.ascontiguousarray(ramp)), spec)
    assert image.shape == (3, 16, 16)
    assert abs(image[0, 8, 7:9].float().mean().item() - 127) < 6


def test_an_image_of_the_right_size_is_untouched():
    assert np.array_equal(load_image(encode(PHOTO), InputSpec(height=24, width=36)).permute(1, 2, 0).numpy(), PHOTO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalising_maps_pixels_to_the_models_range(dtype):
    spec = InputSpec(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    batch = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor(spec.mean).view(-1, 1, 1), torch.tensor(spec.std).view(-1, 1, 1)
    expected = ((batch.double() / 255 - mean) / std).to(dtype)
    result = normalize(batch, spec, dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    ends = normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1), InputSpec())
    torch.testing.assert_close(ends[:, 0].flatten(), torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": (0.5,)}, "mean has 1 values for 3 channels"),
        ({"channels": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}, "channels=4"),
        ({"std": (0.5, 0.0, 0.5)}, "not positive"),
        ({"resize": "shorter_side"}, "smaller than the 224x224 crop"),
        ({"resize_to": 256}, "no effect with resize='square'"),
        ({"mean": (0.5, float("nan"), 0.5)}, "not finite"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        InputSpec(**changes)


def test_specs_survive_json():
    spec = InputSpec(channels=1, height=28, width=28, mean=(0.3,), std=(0.3,), resize="shorter_side", resize_to=32)
    assert InputSpec.from_json(spec.to_json()) == spec
    output = OutputSpec(class_names=("ä", "b"), activation="sigmoid")
    assert OutputSpec.from_json(output.to_json()) == output
    torch.testing.assert_close(output.probabilities(torch.zeros(1, 2)), torch.full((1, 2), 0.5))
    with pytest.raises(TypeError):
        InputSpec.from_json('{"unknown": 1}')
