"""Corpora that are learned in seconds: three colours with noise, one an image or several."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from pipelines.shard import ShardRecipe, make_corpus

COLOURS = ("blue", "green", "red")


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


def write_colour_lists(folder: Path, train: int = 96, held_out: int = 24, side: int = 16, seed: int = 0) -> Corpus:
    """Each image shows one, two or all of three colours; sharded from a list of its names."""
    source = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for split, count in (("train", train), ("val", held_out)):
        for number in range(count):
            shown = [colour for bit, colour in enumerate(COLOURS) if (number % 7 + 1) >> bit & 1]
            pixels = source.integers(0, 90, (side, side, 3), dtype=np.uint8)
            for colour in shown:
                pixels[:, :, ("red", "green", "blue").index(colour)] += 120
            name = f"pictures/{split}{number:03d}.png"
            Image.fromarray(pixels).save(folder / name)
            rows.append({"uri": name, "labels": shown, "split": split})
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_corpus(
        ShardRecipe(
            source=str(folder / "list.jsonl"), destination=str(folder / "corpus"), shard_bytes=20_000, num_workers=0
        )
    )
