"""Small corpora in a folder, with pages of a few samples so that windows and lanes are many."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from vit_model.preprocess import InputSpec

# A busy machine is no fault of a property.
settings.register_profile("reader", deadline=None)
settings.load_profile("reader")

PAGE_SAMPLES = 5
CLASSES = ("cat", "dog", "owl")

GREY = InputSpec(channels=1, height=12, width=12, mean=(0.5,), std=(0.5,))


def picture(number: int, size: tuple[int, int] = (14, 13), kind: str = "PNG", mode: str = "L") -> bytes:
    """A smooth picture with some noise, different for each number."""
    rng = np.random.default_rng(number)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    shape = (height, width) if mode == "L" else (height, width, 3)
    waves = 127 + 90 * np.sin(x / 5 + number) * np.cos(y / 7)
    pixels = (waves if mode == "L" else waves[..., None]) + rng.normal(0, 12, shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """103 training and 17 test pictures in shards of 40."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", PAGE_SAMPLES)
        images = [
            ("train" if i < 103 else "test", CLASSES[i % 3], f"{i:03}.png", picture(i, (10 + i % 9, 9 + i % 7)))
            for i in range(120)
        ]
        return write_corpus(tmp_path_factory.mktemp("corpus"), images, class_names=CLASSES, shard_samples=40)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Iterator[Callable[..., Corpus]]:
    """Writes a corpus of given files, all in one class and split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", PAGE_SAMPLES)

        def make(files: list[bytes], name: str = "corpus", destination: str | None = None) -> Corpus:
            images = [("train", CLASSES[0], f"{i:03}", data) for i, data in enumerate(files)]
            return write_corpus(destination or tmp_path / name, images, class_names=CLASSES, shard_samples=20)

        yield make
