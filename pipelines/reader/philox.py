"""Philox4x32-10, a counter-based random generator, for many images in one call.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Random numbers of an image depend on
(seed, epoch, sample_id) alone, so pixels are the same however the work is cut, scheduled and resumed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["image_bits", "philox4x32", "uniform"]

ROUNDS = 10
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
LOW, HALF = np.uint64(WORD), np.uint64(32)


def philox4x32(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Random words (n, 4) for counters (n, 4)."""
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0 = (product1 >> HALF) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & LOW, product0 & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def image_bits(seed: int, epoch: int, sample_ids: NDArray[np.int64], stream: int) -> NDArray[np.uint32]:
    """Four random words (n, 4) per image; `stream` keeps crop, flip and later uses apart."""
    ids = sample_ids.astype(np.uint64)
    counters = np.empty((len(ids), 4), np.uint32)
    counters[:, 0] = ids & LOW
    counters[:, 1] = ids >> HALF
    counters[:, 2] = epoch
    counters[:, 3] = stream
    return philox4x32(counters, (seed & WORD, seed >> 32 & WORD))


def uniform(bits: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Words to [0, 1)."""
    return np.multiply(bits, 2.0**-32, dtype=np.float64)
