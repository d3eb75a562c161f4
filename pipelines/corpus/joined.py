"""Images of equal content in versions that become one: found over all of them, whichever of them they lie in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.duplicates import Duplicates, find_duplicates
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.records import order_splits
from pipelines.corpus.rows import tar_rows

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.corpus.manifest import Corpus

__all__ = ["join_copies"]

log = logging.getLogger(__name__)
Times = MutableMapping[str, NDArray[np.uint8]]


def join_copies(
    parts: Sequence[tuple[Corpus, Times]], duplicates: Literal["keep", "quarantine"]
) -> tuple[dict[str, int], list[Rejected]]:
    """Counts as in `Head.duplicates`. With `quarantine` the copies also get 0 times, in place, and are listed.

    Images that do not come are no copies, but for those that were put away as copies before: they are counted.
    """
    order = [
        (corpus, times, split)
        for split in order_splits(split for corpus, _ in parts for split in corpus.splits)
        for corpus, times in parts
        if split in corpus.splits
    ]

    def tables() -> Iterator[tuple[str, pa.Table]]:
        for corpus, _, split in order:
            for table in tar_rows(corpus, split, ["content", "label", "labels"]):
                yield split, table

    absent = np.concatenate([times[split] == 0 for _, times, split in order])
    found = find_duplicates(tables, len(absent), absent)
    put_away = _put_away(order, found) if duplicates == "quarantine" else []
    if duplicates == "keep" and (across := found.counts.get("across_splits")):
        log.warning(
            "%d images of the new version occur in more than one split: held-out figures look better than they are",
            across,
        )
    before = np.concatenate([_is_copy(*one) for one in order])
    if before.any():
        return find_duplicates(tables, len(absent), absent & ~before).counts, put_away
    return found.counts, put_away


def _is_copy(corpus: Corpus, times: Times, split: str) -> NDArray[np.bool_]:
    """Which rows of a split are in the quarantine of their version as duplicates."""
    if "duplicate" not in corpus.head.rejected:
        return np.zeros(len(times[split]), np.bool_)
    listed = {
        row["key"] for row in corpus.quarantine().to_pylist() if row["reason"] == "duplicate" and row["split"] == split
    }
    keys = [key for table in tar_rows(corpus, split, ["key"]) for key in table["key"].to_pylist()]
    return np.asarray(np.array([key in listed for key in keys], np.bool_) & (times[split] == 0))


def _put_away(order: Sequence[tuple[Corpus, Times, str]], found: Duplicates) -> list[Rejected]:
    wanted = np.unique(np.concatenate([found.extra, found.kept]))
    described: dict[int, tuple[str, str, str, int]] = {}
    first = 0
    for corpus, times, split in order:
        own = found.extra[np.searchsorted(found.extra, first) :]
        own = own[own < first + len(times[split])]
        if len(own):
            times[split] = times[split].copy()  # It may be a view of the manifest.
            times[split][own - first] = 0
        for table in tar_rows(corpus, split, ["key", "source", "label"]):
            rows = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + table.num_rows)]
            for row, values in zip(rows.tolist(), table.take(rows - first).to_pylist(), strict=True):
                described[row] = values["key"], values["source"], split, values.get("label", -1)
            first += table.num_rows
    return [
        Rejected(*described[extra], "duplicate", f"the same bytes as {described[kept][1]}")
        for extra, kept in zip(found.extra.tolist(), found.kept.tolist(), strict=True)
    ]
