"""Is one model better than another on the same images? The exact paired test, its interval, and how many images decide.

McNemar's test in its exact one-sided form: of the images on which the two disagree about being right, the candidate's
share is compared with a fair coin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "compare", "images_needed"]

POWER = 0.8  # Chance of deciding for a candidate that is as much better as it looks.
SMALLEST_GAIN = 0.01  # What to look for when nothing was seen: one point of accuracy.


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidate against champion on n common images."""

    n: int
    num_wins: int  # Candidate right, champion wrong.
    num_losses: int  # Champion right, candidate wrong.
    difference: float  # Accuracy of the candidate minus that of the champion.
    interval: tuple[float, float]  # Of the difference, 95 %, two-sided.
    p_value: float  # One-sided: chance of at least so many wins if the two were equal.
    alpha: float
    images_needed: int  # To decide at the disagreement and gain seen here (at one point if no gain was seen).

    @property
    def is_better(self) -> bool:
        return self.p_value < self.alpha

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"difference {self.difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f}) on n={self.n:,} images, "
            f"{self.num_wins} won and {self.num_losses} lost, one-sided p={self.p_value:.3g}, alpha={self.alpha:g}"
        )


def compare(candidate: NDArray[np.bool_], champion: NDArray[np.bool_], alpha: float = 0.05) -> Comparison:
    """The two arrays say, image by image in the same order, whether each model was right."""
    if candidate.shape != champion.shape or candidate.ndim != 1 or not candidate.size:
        raise ValueError(f"need two equally long lists of images, got {candidate.shape} and {champion.shape}")
    from scipy.stats import binom

    n = candidate.size
    wins = int((candidate & ~champion).sum())
    losses = int((champion & ~candidate).sum())
    # P(X >= wins), X ~ Bin(wins + losses, 1/2); 1 when they never disagree.
    p_value = float(binom.sf(wins - 1, wins + losses, 0.5))
    return Comparison(
        n=n,
        num_wins=wins,
        num_losses=losses,
        difference=(wins - losses) / n,
        interval=_interval(wins, losses, n),
        p_value=p_value,
        alpha=alpha,
        images_needed=images_needed(wins / n, losses / n, alpha),
    )


def _interval(wins: int, losses: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Agresti and Min (2005): half an image added to each of the four cells keeps the level for small counts."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    total, won, lost = n + 2, wins + 0.5, losses + 0.5
    centre = (won - lost) / total
    half = z * math.sqrt(max(won + lost - (won - lost) ** 2 / total, 0.0)) / total
    return max(centre - half, -1.0), min(centre + half, 1.0)


def images_needed(share_won: float, share_lost: float, alpha: float = 0.05, power: float = POWER) -> int:
    """Images for a decision with that power if the shares stay as they are (Connor 1987, one-sided).

    A candidate that shows no gain gets the number that would show a gain of SMALLEST_GAIN at the same disagreement.
    """
    gain, disagreement = share_won - share_lost, share_won + share_lost
    if gain <= 0:
        gain = SMALLEST_GAIN
        disagreement = max(disagreement, gain)
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha), NormalDist().inv_cdf(power)
    root = z_alpha * math.sqrt(disagreement) + z_power * math.sqrt(max(disagreement - gain * gain, 0.0))
    # Fewer disagreements than this cannot reach alpha even if the candidate wins them all: (1/2)^k < alpha.
    fewest = math.floor(math.log2(1 / alpha)) + 1
    return max(math.ceil((root / gain) ** 2), math.ceil(fewest / disagreement))
