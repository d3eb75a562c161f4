"""Operations against Pillow where it has them; what happens to an image follows from its own numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from pipelines.reader import pixel_ops as ops
from pipelines.reader.levels import LEVELS, Changes, changes_of
from pipelines.reader.loader import AugmentConfig
from pipelines.reader.policies import RANDAUGMENT, THREE_AUGMENT, _matrix, _randaugment, _three, change_images


def pictures(n: int = 4, size: tuple[int, int] = (24, 31), channels: int = 3, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    waves = [
        [90 + 60 * np.sin(x / (3 + i) + c) * np.cos(y / 5) + rng.normal(0, 15, size) for c in range(channels)]
        for i in range(n)
    ]
    return torch.from_numpy(np.array(waves).clip(0, 255).astype(np.uint8))


def by_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in images])


def shown(images: Tensor) -> np.ndarray:
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


FACTOR = 1.7
PILLOW: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Image.Image], Image.Image], int]] = {
    # ours, Pillow's, largest difference in levels (Pillow rounds between the steps of an operation)
    "autocontrast": (ops.autocontrast, ImageOps.autocontrast, 1),
    "equalize": (ops.equalize, ImageOps.equalize, 0),
    "invert": (ops.invert, ImageOps.invert, 0),
    "posterize": (lambda x: ops.posterize(x, torch.full((len(x),), 3.0)), lambda p: ImageOps.posterize(p, 3), 0),
    "solarize": (lambda x: ops.solarize(x, torch.full((len(x),), 100.0)), lambda p: ImageOps.solarize(p, 100), 0),
    "color": (
        lambda x: ops.saturation(x, torch.full((len(x),), FACTOR)),
        lambda p: ImageEnhance.Color(p).enhance(FACTOR),
        2,
    ),
    "contrast": (
        lambda x: ops.contrast(x, torch.full((len(x),), FACTOR)),
        lambda p: ImageEnhance.Contrast(p).enhance(FACTOR),
        2,
    ),
    "brightness": (
        lambda x: ops.brightness(x, torch.full((len(x),), FACTOR)),
        lambda p: ImageEnhance.Brightness(p).enhance(FACTOR),
        1,
    ),
    "sharpness": (
        lambda x: ops.sharpness(x, torch.full((len(x),), FACTOR)),
        lambda p: ImageEnhance.Sharpness(p).enhance(FACTOR),
        2,
    ),
    "grey": (ops.grey, lambda p: p.convert("L").convert("RGB"), 1),
}


@pytest.mark.parametrize("name", PILLOW)
def test_operations_agree_with_pillow(name: str) -> None:
    ours, theirs, tolerance = PILLOW[name]
    images = pictures()
    difference = shown(ours(images.float())).astype(int) - by_pillow(images, theirs).astype(int)
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "strength"), [("rotate", 0.7), ("shear_x", -1.0), ("shear_y", 1.0), ("translate_x", 1.0)]
)
def test_geometry_agrees_with_pillow(name: str, strength: float) -> None:
    images = pictures(2, (32, 32))
    matrix = _matrix(name, np.full(2, strength), 32, 32)
    ours = shown(ops.affine(images.float(), torch.from_numpy(matrix.astype(np.float32))))
    (a, b, c), (d, e, f) = matrix[0]
    center = 16.0  # Pillow counts from the corner, pixel centres at halves.
    data = (a, b, c + center - a * center - b * center, d, e, f + center - d * center - e * center)
    theirs = by_pillow(images, lambda p: p.transform((32, 32), Image.Transform.AFFINE, data, fillcolor=(128, 128, 128)))
    assert (ours != theirs).any(axis=-1).mean() < 0.01  # Ties between two pixels may fall either way.
    assert (ours != images.permute(0, 2, 3, 1).numpy()).any()


def test_translation_moves_whole_pixels_and_fills_with_grey() -> None:
    images = pictures(1, (8, 8))
    moved = shown(ops.affine(images.float(), torch.tensor([[[1.0, 0, 3], [0, 1, 0]]])))
    whole = images.permute(0, 2, 3, 1).numpy()
    assert (moved[:, :, :5] == whole[:, :, 3:]).all()
    assert (moved[:, :, 5:] == 128).all()


def test_cutout_and_blur() -> None:
    images = pictures(2, (20, 20)).float()
    cut = ops.cutout(images, torch.tensor([3.0, 3.0]), torch.tensor([10.0, 0.0]), torch.tensor([5.0, 0.0]))
    assert (cut[0, :, 2:8, 7:13] == 128).all()
    assert (cut[1, :, :3, :3] == 128).all()
    assert ((cut != images).any(dim=1).sum(dim=(1, 2)) <= torch.tensor([36, 9])).all()
    flat = torch.full((1, 3, 20, 20), 77.0)
    torch.testing.assert_close(ops.blur(flat, torch.tensor([1.3])), flat)
    assert ops.blur(images, torch.tensor([0.1, 2.0])).var(dim=(1, 2, 3))[1] < images.var(dim=(1, 2, 3))[1]


def test_every_operation_keeps_shape_and_range_for_grey_and_colour() -> None:
    draws = np.random.default_rng(0).random((3, 4))
    for channels in (1, 3):
        for size in ((16, 16), (9, 21)):
            images = pictures(3, size, channels).float()
            for name in RANDAUGMENT:
                for magnitude in (0.0, 10.0, 20.0, 30.0):
                    out = _randaugment(name, magnitude)(images.clone(), draws)
                    assert out.shape == images.shape, name
                    assert out.isfinite().all()
                    assert 0 <= out.min() <= out.max() <= 255, name
            for name in THREE_AUGMENT:
                assert _three(name)(images.clone(), draws).shape == images.shape


POLICIES = [
    Changes("randaugment", 2, 15.0),
    Changes("three", color_jitter=0.3),
]


@pytest.mark.parametrize("changes", POLICIES, ids=lambda changes: changes.policy)
def test_an_image_is_changed_alike_alone_and_among_others(changes: Changes) -> None:
    images, ids = pictures(40, (16, 16)), np.arange(40) * 7
    epochs = np.where(np.arange(40) < 11, 4, 5)
    together = change_images(images.clone(), changes, 3, epochs, ids)
    assert (together != images).flatten(1).any(dim=1).float().mean() > 0.7
    for rows in (slice(0, 1), slice(9, 20), slice(39, 40)):
        alone = change_images(images[rows].clone(), changes, 3, epochs[rows], ids[rows])
        assert (alone.int() - together[rows].int()).abs().max() <= 1  # Sums of a mean may round another way.


def test_other_epochs_and_seeds_change_otherwise() -> None:
    images, ids = pictures(30, (16, 16)), np.arange(30)
    found = {
        (seed, epoch): change_images(images.clone(), POLICIES[0], seed, np.full(30, epoch), ids)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    first = found.pop((0, 0))
    for other in found.values():
        assert (first != other).flatten(1).any(dim=1).float().mean() > 0.7


def test_each_operation_is_chosen_equally_often() -> None:
    from pipelines.reader.policies import LAYER_STREAM, _draws

    draws = _draws(0, np.zeros(64_000, np.int64), np.arange(64_000), LAYER_STREAM)
    counts = np.bincount((draws[:, 0] * len(RANDAUGMENT)).astype(int), minlength=16)
    assert counts.min() > 3_800
    assert counts.max() < 4_200


def test_presets_are_the_levels_of_augreg() -> None:
    assert changes_of(AugmentConfig()) == Changes()
    assert changes_of(AugmentConfig()).is_nothing
    assert changes_of(AugmentConfig(preset="none")).is_nothing
    for name, (layers, magnitude, mixup) in LEVELS.items():
        if name != "none":
            assert changes_of(AugmentConfig(preset=name)) == Changes("randaugment", layers, magnitude, mixup=mixup)
    assert changes_of(AugmentConfig(preset="medium1", cutmix=1.0)).cutmix == 1.0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"preset": "medium1", "mixup": 0.5}, "preset=medium1 already sets mixup"),
        ({"preset": "light1", "policy": "three"}, "preset=light1 already sets policy"),
        ({"magnitude": 9.0}, "have no effect with policy=none"),
        ({"policy": "three", "layers": 3}, "have no effect with policy=three"),
        ({"policy": "randaugment", "magnitude": -1.0}, "magnitude=-1.0"),
        ({"color_jitter": 1.0}, "color_jitter=1.0"),
        ({"cutmix": -0.1}, "cutmix=-0.1"),
    ],
)
def test_keys_without_sense_or_effect_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**keys)
