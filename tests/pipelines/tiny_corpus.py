"""A corpus that is learned in seconds: three colours with noise."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus


def write_colours(name: str, train: int = 480, held_out: int = 90, side: int = 20) -> Corpus:
    source = np.random.default_rng(0)
    images = []
    for split, count in (("train", train), ("val", held_out), ("test", held_out)):
        for number in range(count):
            pixels = source.integers(0, 90, (side, side, 3), dtype=np.uint8)
            pixels[:, :, number % 3] += 80
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            label = ("red", "green", "blue")[number % 3]
            images.append((split, label, f"{split}/{label}/{number:05d}.png", file.getvalue()))
    return write_corpus(name, images, shard_samples=160)
