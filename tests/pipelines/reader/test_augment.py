"""Crops follow the paper's law, inside the image, and depend on the image's own numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.reader.augment import AugmentConfig, crop_boxes, flips, shifts
from pipelines.reader.loader import ReaderConfig

SIDES = st.integers(1, 3000)


@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=20), seed=st.integers(0, 2**62))
def test_every_crop_lies_inside_its_image(sizes: list[tuple[int, int]], seed: int) -> None:
    widths, heights = np.array(sizes, np.int64).T
    boxes = crop_boxes(AugmentConfig(), seed, 3, np.arange(len(sizes)), widths, heights)
    for (x, y, width, height), full_width, full_height in zip(boxes.tolist(), widths, heights, strict=True):
        assert 0 <= x <= x + width <= full_width
        assert 0 <= y <= y + height <= full_height
        assert width > 0
        assert height > 0


def test_crops_keep_the_ranges_of_area_and_aspect_and_use_all_of_them() -> None:
    n = 20_000
    widths, heights = np.full(n, 500), np.full(n, 375)
    boxes = crop_boxes(AugmentConfig(), 1, 0, np.arange(n), widths, heights)
    area = boxes.width * boxes.height / (500 * 375)
    aspect = boxes.width / boxes.height
    assert 0.05 <= area.min() < 0.052
    assert 0.98 < area.max() <= 1
    assert 0.73 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.36
    # Offsets are uniform and reach both borders.
    free = 500 - boxes.width
    assert abs((boxes.x / np.maximum(free, 1))[free > 50].mean() - 0.5) < 0.01
    assert (boxes.x == free).any()
    assert (boxes.x == 0).any()


def test_a_crop_is_the_same_alone_and_among_others() -> None:
    config, ids = AugmentConfig(), np.array([9, 4, 7])
    sides = np.array([30, 200, 31])
    together = crop_boxes(config, 1, 2, ids, sides, sides[::-1]).tolist()
    for i in range(3):
        assert crop_boxes(config, 1, 2, ids[[i]], sides[[i]], sides[::-1][[i]]).tolist() == [together[i]]


def test_an_image_too_long_for_any_crop_is_shown_whole() -> None:
    boxes = crop_boxes(AugmentConfig(), 0, 0, np.arange(5), np.full(5, 5000), np.full(5, 20))
    assert boxes.tolist() == [(0, 0, 5000, 20)] * 5


def test_half_of_the_images_are_mirrored_and_others_next_epoch() -> None:
    ids = np.arange(10_000)
    first, second = (flips(AugmentConfig(), 0, epoch, ids) for epoch in (0, 1))
    assert abs(first.mean() - 0.5) < 0.02
    assert abs((first == second).mean() - 0.5) < 0.02
    assert not flips(AugmentConfig(flip=False), 0, 0, ids).any()


def test_shifts_reach_every_offset_equally() -> None:
    offsets = shifts(AugmentConfig(crop="random", padding=2), 0, 0, np.arange(25_000))
    counts = np.bincount(offsets[:, 0] * 5 + offsets[:, 1], minlength=25)
    assert len(counts) == 25
    assert counts.min() > 850


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": "none", "min_area": 0.2}, "min_area has no effect with crop=none"),
        ({"padding": 8}, "padding has no effect with crop=inception; set crop=random"),
        ({"min_area": 0.9, "max_area": 0.5}, "min_area=0.9"),
        ({"min_aspect": 0.0}, "min_aspect=0.0"),
        ({"crop": "random", "padding": -1}, "padding=-1"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (AugmentConfig, {"crop": "inceptoin"}),
        (AugmentConfig, {"policy": "randaug"}),
        (AugmentConfig, {"preset": "strong"}),
        (ReaderConfig, {"on_bad": "fial"}),
        (ReaderConfig, {"engine": "nativ"}),
        (ReaderConfig, {"backend": "locl"}),
        (ReaderConfig, {"decode": None}),
    ],
)
def test_a_misspelt_word_is_refused_in_a_script_too(kind: Any, values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is not one of '"):
        kind(**values)
