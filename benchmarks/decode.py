"""One core: JPEG to crop, 224 px, mirrored, uint8 CHW. The engines of the reader beside timm's PIL path.

    python benchmarks/decode.py [--quick] [--images 192] [--rounds 9]

Every variant sees the same images, crops and flips, in turn in every round; CPU time of the one thread; the figures are
medians over rounds, ratios are medians of ratios within a round. timm resizes bicubic, which is what people run; the
same path bilinear stands beside it, since the reader is bilinear. The photos are the two that scikit-learn ships, cut,
scaled and made noisy to ImageNet's shapes and bits per pixel. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from pipelines.corpus.images import ImageFacts
from pipelines.corpus.tiled import tile_jpeg
from pipelines.reader import native
from pipelines.reader.augment import AugmentConfig, crop_boxes, flips
from pipelines.reader.decode import EngineName, decode_for_training
from vit_model.preprocess import InputSpec

SHAPES = (
    [(500, 375)] * 7 + [(500, 333)] * 3 + [(375, 500)] * 3 + [(333, 500)] * 2 + [(500, 500), (640, 480), (800, 600)]
)
SPEC, AUGMENT, SEED = InputSpec(), AugmentConfig(), 0


def photos(count: int, scale: float = 1.0) -> list[bytes]:
    """4:2:0, quality 85 to 96, about 200,000 px and 4 bits a pixel, as in ImageNet."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        image, (width, height) = whole[i % 2], SHAPES[i % len(SHAPES)]
        width, height = int(width * scale), int(height * scale)
        part = min(image.width / width, image.height / height) * rng.uniform(0.55, 1)
        box_width, box_height = int(width * part), int(height * part)
        x, y = rng.integers(image.width - box_width + 1), rng.integers(image.height - box_height + 1)
        cut = image.resize((width, height), Image.Resampling.LANCZOS, box=(x, y, x + box_width, y + box_height))
        cut = ImageEnhance.Contrast(cut).enhance(rng.uniform(0.8, 1.25))
        cut = cut.filter(ImageFilter.UnsharpMask(1.0, int(rng.uniform(60, 160)), 0))
        noise = rng.normal(0, rng.uniform(3, 9), (height, width, 1)) + rng.normal(0, 1.5, (height, width, 3))
        file = io.BytesIO()
        pixels = (np.asarray(cut) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.choice([85, 90, 92, 95, 96])), subsampling=2)
        made.append(file.getvalue())
    return made


def import_timm() -> Any:
    """timm's transforms; the second attempt is for a CUDA torchvision on a CPU torch."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    try:
        return importlib.import_module("timm.data.transforms")
    except ImportError:
        return None


class Contest:
    """The variants, each decoding all images into the same array."""

    def __init__(self, images: list[bytes]) -> None:
        self.images = images
        self.ids = np.arange(len(images))
        sizes = np.array([Image.open(io.BytesIO(data)).size for data in images])
        self.boxes = crop_boxes(AUGMENT, SEED, 0, self.ids, sizes[:, 0], sizes[:, 1]).tolist()
        self.flips = flips(AUGMENT, SEED, 0, self.ids)
        self.out = np.zeros((len(images), 3, SPEC.height, SPEC.width), np.uint8)
        self.variants: dict[str, Callable[[], None]] = {}
        timm = import_timm()
        print("timm's own transforms" if timm else "timm is not here: the calls that its transforms make")
        for name, filter_name in (("timm", "bicubic"), ("timm bilinear", "bilinear")):
            crop = self._timm_crop(timm, filter_name) if timm else self._pil_crop(filter_name)
            self.variants[name] = lambda crop=crop: self._pil(crop)
        self.variants["wheels"] = lambda: self._ours(images, "wheels")
        if not native.why_not():
            self.variants["native"] = lambda: self._ours(images, "native")
            tiled = self._tiled(sizes)
            if tiled is not None:
                self.tiled_bytes = sum(map(len, tiled)) / sum(map(len, images))
                self.variants["tiled"] = lambda: self._ours(tiled, "native")

    def _timm_crop(
        self, timm: Any, filter_name: str
    ) -> Callable[[Image.Image, tuple[int, int, int, int]], Image.Image]:
        class Chosen(timm.RandomResizedCropAndInterpolation):  # type: ignore[misc, name-defined]
            box = (0, 0, 1, 1)

            def get_params(self, image: Any, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
                x, y, width, height = self.box
                return y, x, height, width

        transform = Chosen(SPEC.width, interpolation=filter_name)

        def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
            transform.box = box
            return transform(image)

        return crop

    def _pil_crop(self, filter_name: str) -> Callable[[Image.Image, tuple[int, int, int, int]], Image.Image]:
        resampling = Image.Resampling[filter_name.upper()]
        size = (SPEC.width, SPEC.height)
        return lambda image, box: image.crop((box[0], box[1], box[0] + box[2], box[1] + box[3])).resize(
            size, resampling
        )

    def _pil(self, crop: Callable[[Image.Image, tuple[int, int, int, int]], Image.Image]) -> None:
        for i, data in enumerate(self.images):
            image = crop(Image.open(io.BytesIO(data)).convert("RGB"), self.boxes[i])
            if self.flips[i]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            self.out[i] = np.asarray(image).transpose(2, 0, 1)

    def _ours(self, images: list[bytes], engine: EngineName) -> None:
        views = [memoryview(data) for data in images]
        faults = decode_for_training(
            views, self.ids, self.ids, spec=SPEC, augment=AUGMENT, seed=SEED, epoch=0, out=self.out, engine=engine
        )
        assert not faults, faults

    def _tiled(self, sizes: NDArray[np.int64]) -> list[bytes] | None:
        try:
            return [
                tile_jpeg(data, ImageFacts("jpg", *size))
                for data, size in zip(self.images, sizes.tolist(), strict=True)
            ]
        except ImportError as error:
            print(f"no tiled images: {error}")
            return None

    def check(self) -> float:
        """Mean difference of each engine from PIL bilinear, in levels; the engines must agree to the last bit."""
        pixels = {}
        for name, run in self.variants.items():
            run()
            pixels[name] = self.out.astype(np.int16)
        assert all((pixels[name] == pixels["wheels"]).all() for name in pixels if not name.startswith("timm"))
        return float(np.abs(pixels["wheels"] - pixels["timm bilinear"]).mean())

    def measure(self, rounds: int) -> dict[str, list[float]]:
        """CPU microseconds per image of each round."""
        times: dict[str, list[float]] = {name: [] for name in self.variants}
        for i in range(rounds):
            for name in list(self.variants)[:: 1 if i % 2 else -1]:  # Nobody is always first.
                started = time.thread_time()
                self.variants[name]()
                times[name].append((time.thread_time() - started) / len(self.images) * 1e6)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less than a minute")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="of the photos' sides; 4 is a camera's picture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count, rounds = (48, 5) if arguments.quick else (arguments.images, arguments.rounds)
    images = photos(count, arguments.scale)
    contest = Contest(images)
    difference = contest.check()
    times = contest.measure(rounds)
    print(f"{count} images of {statistics.mean(map(len, images)) / 1e3:.0f} KB, {rounds} rounds")
    print(f"{'':14}{'us/image':>9}{'vs timm':>9}{'vs timm bilinear':>18}")
    result: dict[str, float] = {"difference_from_pil_bilinear": round(difference, 3)}
    for name, own in times.items():
        ratios = [statistics.median(a / b for a, b in zip(times[peer], own, strict=True)) for peer in list(times)[:2]]
        print(f"{name:14}{statistics.median(own):9.0f}{ratios[0]:9.2f}{ratios[1]:18.2f}")
        if not name.startswith("timm"):
            result[f"single_core_{name}"] = round(ratios[0], 2)
            result[f"single_core_{name}_like_for_like"] = round(ratios[1], 2)
            result[f"{name}_microseconds"] = round(statistics.median(own))
    if "tiled" in times:
        result["tiled_bytes"] = round(contest.tiled_bytes, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
