"""IDX files (MNIST's format) as a source."""

from __future__ import annotations

import gzip
import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipelines.corpus.errors import SourceError
from pipelines.corpus.fetch import fetch
from pipelines.corpus.idx import encode_png
from pipelines.corpus.images import inspect_image
from pipelines.corpus.listing import local_etag
from pipelines.corpus.sources import open_source

from .inputs import idx_folder, idx_images, idx_labels, planned


@pytest.mark.parametrize("packed", [True, False])
def test_idx_rows_become_png_without_loss(packed: bool, tmp_path: Path) -> None:
    from vit_model.preprocess import decode_image

    base = idx_folder(tmp_path / "s", packed=packed)
    entries = open_source(str(base)).entries()
    assert [entries.split.count(name) for name in ("train", "test")] == [60, 20]
    assert set(entries.label) == {0, 1, 2, 3}
    assert entries.path[0].startswith("t10k-images-idx3-ubyte/")  # The same name packed or not.
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 7), dtype=np.uint8)
    files = list(fetch("idx", planned(entries)))[20:]
    for image, data in zip(images, files, strict=True):
        assert isinstance(data, bytes)
        facts = inspect_image(data)
        assert (facts.extension, facts.width, facts.height) == ("png", 7, 9)
        assert np.array_equal(decode_image(data, 1)[0].numpy(), image)


def test_a_file_of_names_gives_idx_classes_their_names(tmp_path: Path) -> None:
    base = idx_folder(tmp_path / "s")
    (base / "classes.txt").write_text("zero\none\n\ntwo\nthree\n")
    assert open_source(str(base)).entries().class_names == ("zero", "one", "two", "three")


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (28, 28)])
def test_the_hand_made_png_is_read_by_pillow(shape: tuple[int, int]) -> None:
    from PIL import Image

    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image)))), image)


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("train-images-idx3-ubyte", b"nonsense" * 10, "no IDX file of images"),
        ("train-images-idx3-ubyte", b"\x1f\x8b" + b"x" * 50, "damaged gzip"),
        ("train-images-idx3-ubyte", idx_images(np.zeros((5, 2, 2))), "they must agree"),
        ("train-labels-idx1-ubyte", idx_labels(np.zeros(60), packed=False)[:-3], "says 60 labels and has 57"),
        ("train-labels-idx1-ubyte", b"", "no IDX file of labels"),
    ],
)
def test_a_damaged_idx_file_is_named(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    base = idx_folder(tmp_path / "s", packed=False)
    (base / name).write_bytes(data)
    with pytest.raises(SourceError, match=words):
        open_source(str(base)).entries()


def test_an_idx_file_that_ends_early_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    base = idx_folder(tmp_path / "s", packed=False)
    images = base / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    entries = open_source(str(base)).entries()
    with pytest.raises(SourceError, match="says 60 images"):
        list(fetch("idx", planned(entries)))


@pytest.mark.parametrize("name", ["classes.txt", "train-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"])
def test_a_file_of_idx_that_cannot_be_read_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = idx_folder(tmp_path / "s")
    (base / "classes.txt").write_text("a\nb\nc\nd\n")
    source = open_source(str(base))

    def failing(status: os.stat_result) -> str:
        if status.st_ino == (base / name).stat().st_ino:
            raise OSError(5, "Input/output error")
        return local_etag(status)

    monkeypatch.setattr("pipelines.corpus.fetch.local_etag", failing)
    with pytest.raises(SourceError, match=f"cannot read .*/{name}: Input/output error"):
        source.entries()


def test_a_class_that_is_named_twice_beside_idx_files_is_an_error(tmp_path: Path) -> None:
    base = idx_folder(tmp_path / "s")
    (base / "classes.txt").write_text("a\nb\nb\nc\n")
    with pytest.raises(SourceError, match=r"classes.txt names 'b' twice"):
        open_source(str(base)).entries()


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"])
def test_a_packed_file_is_unpacked_no_further_than_its_header_says(name: str, tmp_path: Path) -> None:
    base = idx_folder(tmp_path / "s")
    data = gzip.decompress((base / name).read_bytes())
    (base / name).write_bytes(gzip.compress(data + bytes(200_000_000), 1))
    tracemalloc.start()
    with pytest.raises(SourceError, match=f"{name} says 60 .*; fetch it again"):
        entries = open_source(str(base)).entries()
        list(fetch("idx", planned(entries)))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    (base / name).write_bytes(gzip.compress(data)[:-20])
    with pytest.raises(SourceError, match=name):
        list(fetch("idx", planned(open_source(str(base)).entries())))
