"""Images meet others of their own lane alone, by shares that their labels tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reader.mixup import draw_mix, mix_images, mix_labels
from pipelines.training.losses import loss_sum

SIZE = (12, 17)
CLASSES = 5


def lanes_of(count: int, each: int) -> np.ndarray:
    return np.repeat(np.arange(count) * 3, each)


@settings(max_examples=40, deadline=None)
@given(
    alphas=st.sampled_from([(0.2, 0.0), (0.0, 1.0), (0.8, 1.0)]),
    step=st.integers(0, 2**33),
    each=st.integers(2, 6),
    bad=st.sets(st.integers(0, 11)),
)
def test_pairs_lie_in_one_lane_and_bad_samples_meet_nobody(
    alphas: tuple[float, float], step: int, each: int, bad: set[int]
) -> None:
    lanes = lanes_of(4, each)
    weights = np.array([i not in bad for i in range(len(lanes))], np.float32)
    mix = draw_mix(*alphas, 7, step, lanes, weights, SIZE)
    assert (lanes[mix.partner] == lanes).all()
    assert (weights[mix.partner][weights > 0] > 0).all()
    assert (mix.partner[weights == 0] == np.flatnonzero(weights == 0)).all()
    assert (mix.share[weights == 0] == 1).all()
    assert sorted(mix.partner) == list(range(len(lanes)))  # Each image is given once.
    assert ((mix.share >= 0) & (mix.share <= 1)).all()
    if not alphas[1]:
        assert (mix.share >= 0.5).all()
        assert not mix.is_cut.any()


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 1000), world_size=st.sampled_from([2, 3, 4]))
def test_a_mixed_image_is_the_same_at_any_number_of_workers(step: int, world_size: int) -> None:
    source = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (12, 3, *SIZE), dtype=torch.uint8, generator=source)
    labels = torch.randint(0, CLASSES, (12,), generator=source)
    lanes, weights = lanes_of(4, 3), np.ones(12, np.float32)

    def mixed(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        mix = draw_mix(0.8, 1.0, 1, step, lanes[rows], weights[rows], SIZE)
        index = torch.from_numpy(rows)
        return mix_images(images[index], mix), mix_labels(labels[index], mix, CLASSES)

    whole = mixed(np.arange(12))
    for rank in range(world_size):
        rows = np.flatnonzero((lanes // 3) % world_size == rank)
        part = mixed(rows)
        assert (part[0] == whole[0][rows]).all()
        assert (part[1] == whole[1][rows]).all()


def test_mixup_is_the_weighted_mean_of_pixels_and_labels() -> None:
    images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4).clone()
    mix = draw_mix(1.0, 0.0, 0, 3, np.zeros(3, np.int64), np.ones(3, np.float32), (4, 4))
    share = float(mix.share[0])
    expected = [round(share * a + (1 - share) * b) for a, b in ((0, 100), (100, 200), (200, 0))]
    found = mix_images(images, mix)[:, 0, 0, 0].tolist()
    assert np.abs(np.subtract(found, expected)).max() <= 1
    labels = mix_labels(torch.tensor([0, 1, 2]), mix, 3)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(labels[1], torch.tensor([0.0, share, 1 - share]))


def test_cutmix_pastes_a_box_whose_area_the_labels_tell() -> None:
    images = torch.tensor([10, 90], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, *SIZE).clone()
    areas = []
    for step in range(200):
        mix = draw_mix(0.0, 1.0, 0, step, np.zeros(2, np.int64), np.ones(2, np.float32), SIZE)
        mixed = mix_images(images, mix)
        pasted = (mixed[0, 0] == 90).float().mean().item()
        assert pasted == pytest.approx(1 - float(mix.share[0]), abs=1e-6)
        assert ((mixed == 10) | (mixed == 90)).all()
        areas.append(pasted)
    assert 0.2 < np.mean(areas) < 0.5  # Boxes are cut at the border, so less than a half.
    assert max(areas) > 0.6


def test_shares_follow_the_beta_distribution_and_both_kinds_occur() -> None:
    lanes = np.repeat(np.arange(4000), 2)
    weights = np.ones(8000, np.float32)
    mix = draw_mix(0.2, 0.0, 0, 0, lanes, weights, SIZE)
    # max(x, 1 - x) of Beta(0.2, 0.2): mean 0.5 + E|x - 0.5|.
    x = np.random.default_rng(0).beta(0.2, 0.2, 200_000)
    assert float(mix.share[::2].mean()) == pytest.approx(float(np.maximum(x, 1 - x).mean()), abs=0.01)
    both = draw_mix(0.2, 1.0, 0, 0, lanes, weights, SIZE)
    assert both.is_cut.mean() == pytest.approx(0.5, abs=0.03)


def test_the_loss_of_mixed_labels_is_the_mixed_loss() -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(4, CLASSES, generator=source)
    labels = torch.tensor([0, 3, 2, 1])
    mix = draw_mix(0.4, 0.0, 0, 1, np.zeros(4, np.int64), np.ones(4, np.float32), SIZE)
    soft, share = mix_labels(labels, mix, CLASSES), torch.from_numpy(mix.share)
    for kind in ("softmax", "sigmoid"):
        for smoothing in (0.0, 0.1):
            mixed = loss_sum(logits, soft, torch.ones(4), kind, smoothing)  # type: ignore[arg-type]
            own = loss_sum(logits, labels, share, kind, smoothing)  # type: ignore[arg-type]
            other = loss_sum(logits, labels[torch.from_numpy(mix.partner)], 1 - share, kind, smoothing)  # type: ignore[arg-type]
            torch.testing.assert_close(mixed, own + other)
