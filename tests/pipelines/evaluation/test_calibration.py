"""Expected calibration error against the definition, bin by bin."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.calibration import calibration


def test_error_is_the_weighted_gap() -> None:
    result = calibration(np.array([0.9, 0.9, 0.9, 0.9, 0.5], np.float32), np.array([1, 1, 1, 0, 1], bool), num_bins=10)
    assert result.error == pytest.approx((4 * abs(0.9 - 0.75) + 1 * 0.5) / 5, abs=1e-6)
    assert result.counts.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 4, 0]


def test_a_calibrated_model_has_a_small_error() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.1, 1.0, 200_000).astype(np.float32)
    assert calibration(probability, rng.random(200_000) < probability).error < 0.01


def test_nothing_gives_zero() -> None:
    assert calibration(np.zeros(0, np.float32), np.zeros(0, bool)).error == 0.0
