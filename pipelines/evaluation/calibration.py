"""How far the stated probabilities are from the observed frequencies (expected calibration error, Guo et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Calibration", "calibration"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Equal-width bins of the probability of the predicted class; empty bins have NaN means."""

    error: float  # Mean |confidence - accuracy|, weighted by the number of samples of each bin.
    edges: NDArray[np.float64]  # (bins + 1,)
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    counts: NDArray[np.int64]


def calibration(probability: NDArray[np.float32], is_right: NDArray[np.bool_], num_bins: int = 15) -> Calibration:
    """`probability` of the predicted class and whether it was right, sample by sample."""
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    # A probability on an edge belongs to the bin below it, as in the paper: (low, high].
    bins = np.clip(np.ceil(np.asarray(probability, np.float64) * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        confidence = np.bincount(bins, weights=probability, minlength=num_bins) / counts
        accuracy = np.bincount(bins, weights=is_right, minlength=num_bins) / counts
    gap = np.nan_to_num(np.abs(confidence - accuracy))
    total = max(int(counts.sum()), 1)
    return Calibration(float((gap * counts).sum() / total), edges, confidence, accuracy, counts.astype(np.int64))
