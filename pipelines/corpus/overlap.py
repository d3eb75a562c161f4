"""Parts of a mixture that hold the same images: a corpus and a subset of it, or two subsets with one test split.

Such an image is one sample of the mixture. In the split that is mixed it comes as often as all its parts say together,
in every other split as often as one of them says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.errors import CorpusError
from pipelines.corpus.rows import tar_rows
from pipelines.corpus.selection import MOST

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus

__all__ = ["join_overlaps"]

Times = dict[str, dict[str, NDArray[np.uint8]]]  # By part and split, over the rows in its tars.


def join_overlaps(corpora: Mapping[str, Corpus], maps: Mapping[str, tuple[int, ...]], times: Times, split: str) -> None:
    """Give the samples that several parts hold to the first of them. `maps`: new label of each class of a part.

    Raises CorpusError where an image would have two labels, or come more than 255 times.
    """
    for own in dict.fromkeys(name for part in times.values() for name in part):
        holders: dict[tuple[str, str, int], list[tuple[str, int]]] = {}  # Of a tar: parts, and their first row of it.
        labels: dict[str, list[Any]] = {}
        for part, corpus in corpora.items():
            if own not in times[part]:
                continue
            first = 0
            for shard in corpus.layout.shards_of(list(corpus.splits).index(own)):
                rows = int(corpus.layout.samples[shard])
                tar = corpus.shard_uri(shard), corpus.shards[shard].sha256, rows
                mine = slice(first, first + rows)
                first += rows
                for other, start in holders.setdefault(tar, []):
                    if not times[part][own][mine].any():
                        break
                    for one in (part, other):
                        if one not in labels:
                            labels[one] = _labels(corpora[one], own, maps[one])
                    theirs = slice(start, start + rows)
                    same = np.array([a == b for a, b in zip(labels[part][mine], labels[other][theirs], strict=True)])
                    _join(times, own, (other, theirs), (part, mine), same, adds=own == split)
                holders[tar].append((part, mine.start))


def _join(
    times: Times, split: str, to: tuple[str, slice], of: tuple[str, slice], same: NDArray[np.bool_], *, adds: bool
) -> None:
    kept, given = times[to[0]][split].copy(), times[of[0]][split].copy()
    here, there = kept[to[1]], given[of[1]]
    if twice := int(((here > 0) & (there > 0) & ~same).sum()):
        raise CorpusError(
            f"corpora.{to[0]} and corpora.{of[0]} both hold {twice:,} images of split {split!r} and give them different"
            " labels; map their classes alike, or leave these out of one of them in `classes`"
        )
    both: NDArray[Any] = here.astype(np.int64) + there if adds else np.maximum(here, there)
    if int(both[same].max(initial=0)) > MOST:
        raise CorpusError(
            f"an image of corpora.{to[0]} and corpora.{of[0]} would come {int(both[same].max())} times per epoch, the"
            f" limit is {MOST}; choose weights less far apart"
        )
    here[same] = both[same]
    there[same] = 0
    times[to[0]][split], times[of[0]][split] = kept, given


def _labels(corpus: Corpus, split: str, new: tuple[int, ...]) -> list[Any]:
    """What the mixture calls each sample in the tars of a split."""
    if not corpus.head.multi_label:
        return [new[label] for table in tar_rows(corpus, split, ["label"]) for label in table["label"].to_pylist()]
    lists = (one for table in tar_rows(corpus, split, ["labels"]) for one in table["labels"].to_pylist())
    return [sorted({new[label] for label in one if new[label] >= 0}) for one in lists]
