"""Re-marking changes neither a coefficient nor a marker, and leaves alone what it cannot do."""

from __future__ import annotations

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.corpus import tiled
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.images import ImageFacts
from pipelines.shard import ShardRecipe, make_corpus

try:
    from pipelines.corpus.native import _tiled
except ImportError as error:
    # The failure of an optional extension is silent: where it could have been built, it must be here.
    can_build = shutil.which("cc") and any(Path("/usr").glob("include/**/jpeglib.h"))
    assert not can_build, f"the extension is missing ({error}); pip install -e . -v shows why"
    pytest.skip(f"not built: {error}", allow_module_level=True)


def photo(width: int = 400, height: int = 300, mode: str = "RGB", **options: Any) -> bytes:
    rng = np.random.default_rng(width)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 90 * np.sin(x / k) * np.cos(y / 9) for k in (5, 9, 14)], -1)
    file = io.BytesIO()
    Image.fromarray((waves + rng.normal(0, 9, waves.shape)).clip(0, 255).astype(np.uint8)).convert(mode).save(
        file, "JPEG", **options
    )
    return file.getvalue()


FACTS = ImageFacts("jpg", 400, 300)


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("options", "mcus"),
    [
        ({}, 6),
        ({"subsampling": 0}, 12),
        ({"subsampling": 1}, 6),
        ({"mode": "L"}, 12),
        ({"progressive": True}, 6),
        ({"restart_marker_rows": 1}, 6),
        ({"icc_profile": b"profile" * 20_000, "comment": b"hello", "exif": b"Exif\0\0II*\0\10\0\0\0\0\0"}, 6),
    ],
)
def test_a_tiled_file_has_the_same_pixels_and_markers(options: dict[str, Any], mcus: int) -> None:
    data = photo(**options)
    made = tiled.tile_jpeg(data, FACTS)
    assert b"\xff\xdd\0\4\0" + bytes([mcus]) in made
    assert (pixels(made) == pixels(data)).all()
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(made))
    assert {key: before.info.get(key) for key in ("icc_profile", "comment", "exif", "dpi")} == {
        key: after.info.get(key) for key in ("icc_profile", "comment", "exif", "dpi")
    }
    assert "progressive" not in after.info
    assert tiled.tile_jpeg(made, FACTS) == made


@pytest.mark.parametrize(
    "data",
    [photo(mode="CMYK"), photo()[:-2], photo()[:5000], photo()[:3000] + photo()[3500:], b"\xff\xd8\xff\xd9", b"no"],
)
def test_what_cannot_be_tiled_is_left_as_it_is(data: bytes) -> None:
    assert tiled.tile_jpeg(data, FACTS) is data


def test_small_images_are_left_as_they_are() -> None:
    data = photo(100, 100)
    assert tiled.tile_jpeg(data, ImageFacts("jpg", 100, 100)) is data


def test_limits() -> None:
    with pytest.raises(ValueError, match="400 x 300 pixels"):
        _tiled.tile(photo(), 96, 119_999)


def test_without_the_extension_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pipelines.corpus.native", None)
    with pytest.raises(CorpusError, match="jpeg=keep"):
        tiled.check_tiling()


def test_a_corpus_of_tiled_images_has_the_pixels_of_its_source(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "ab"[i % 2] / f"{i}.jpg").write_bytes(photo(400 + i, 300))
    recipe = ShardRecipe(source=str(tmp_path / "photos"), destination=str(tmp_path / "c"), num_workers=0, jpeg="tiled")
    corpus = make_corpus(recipe)
    kept = make_corpus(replace(recipe, destination=str(tmp_path / "kept"), jpeg="keep"))
    assert corpus.digest != kept.digest
    images = [member for path in sorted((tmp_path / "c" / "shards").iterdir()) for member in jpegs(path)]
    assert len(images) == 3
    wanted = {pixels(path.read_bytes()).tobytes() for path in (tmp_path / "photos").rglob("*.jpg")}
    assert {pixels(image).tobytes() for image in images} == wanted
    assert all(b"\xff\xdd\0\4\0\6" in image for image in images)


def jpegs(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
