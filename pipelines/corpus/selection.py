"""Which samples a subset takes and how often each comes, as whole numbers: an epoch always has the same length.

Every choice is a function of the sample's place in the manifest and the seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.errors import CorpusError
from pipelines.corpus.plan import mix, permutation
from pipelines.corpus.rows import tar_rows, tar_times

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus

__all__ = [
    "first_per_class",
    "is_multiplied",
    "present",
    "random_fraction",
    "repeat_factors",
    "single_labels",
    "whole_times",
]

MOST = 255  # Times per epoch: a byte a sample.
Times = NDArray[np.uint8]


def present(corpus: Corpus, split: str) -> Times:
    """How often each sample in the tars of a split comes."""
    times = tar_times(corpus, split)
    if times is not None:
        return times
    layout = corpus.layout
    shards = layout.shards_of(list(corpus.splits).index(split))
    return np.ones(int(layout.samples[shards.start : shards.stop].sum()), np.uint8)


def is_multiplied(corpus: Corpus, split: str) -> bool:
    """Whether some samples of a split come more often than once."""
    return split in corpus.splits and int(present(corpus, split).max(initial=0)) > 1


def single_labels(corpus: Corpus, split: str) -> NDArray[np.int32]:
    """The label of each sample in the tars of a split."""
    if corpus.head.multi_label:
        raise CorpusError(f"corpus {corpus.reference} has several labels an image; this needs one label an image")
    parts = [table["label"].to_numpy() for table in tar_rows(corpus, split, ["label"])]
    return np.concatenate([*parts, np.empty(0, np.int32)])


def random_fraction(times: Times, fraction: float, seed: int) -> Times:
    """A fraction of the samples. With one seed a smaller subset lies in every larger one."""
    rows = np.flatnonzero(times)
    chosen = rows[permutation(rows.astype(np.uint64), seed)[: max(1, round(fraction * len(rows)))]]
    return _only(times, chosen)


def first_per_class(times: Times, labels: NDArray[np.int32], count: int) -> Times:
    """The first `count` samples of each class in manifest order."""
    rows = np.flatnonzero(times)
    order = rows[np.argsort(labels[rows], kind="stable")]
    own = labels[order]
    firsts = np.searchsorted(own, own)  # Where each sample's class begins.
    return _only(times, order[np.arange(len(order)) - firsts < count])


def repeat_factors(times: Times, labels: NDArray[np.int32], threshold: float) -> NDArray[np.float64]:
    """max(1, sqrt(threshold / share of its class)) of each sample (Gupta et al. 2019, LVIS, appendix C)."""
    counts = np.bincount(labels[times > 0], minlength=int(labels.max(initial=0)) + 1)
    share = np.maximum(counts, 1) / max(1, counts.sum())
    factors: NDArray[np.float64] = np.maximum(1.0, np.sqrt(threshold / share))
    return factors[np.maximum(labels, 0)]


def whole_times(times: Times, factors: NDArray[np.float64] | float, seed: int) -> Times:
    """`times` multiplied; what is left of a whole number is given to as large a share of the samples.

    Times above one were drawn before, perhaps with this seed: the next draw must know nothing of that one.
    """
    wanted = times * np.asarray(factors, np.float64)
    keys = np.arange(len(times), dtype=np.uint64)
    salt = seed + 1 + (int(times.sum(dtype=np.int64)) << 32 if times.max(initial=0) > 1 else 0)
    chance = mix(keys ^ mix(np.array([salt % 2**64], np.uint64))) / 2.0**64
    whole = np.floor(wanted + 1e-9)
    whole += chance < wanted - whole
    if (most := int(whole.max(initial=0))) > MOST:
        raise CorpusError(
            f"a sample would come {most} times per epoch, the limit is {MOST}; choose weights less far apart"
        )
    found: Times = whole.astype(np.uint8)
    return found


def _only(times: Times, rows: NDArray[np.int64]) -> Times:
    chosen = np.zeros_like(times)
    chosen[rows] = times[rows]
    return chosen
