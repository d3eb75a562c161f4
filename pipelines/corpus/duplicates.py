"""Images of equal content: how many there are, where, and which copy stays if the others are to go.

Memory is bounded: of a corpus larger than TOGETHER the contents are looked at in turns, by the first bits of the hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Duplicates", "find_duplicates"]

RANKS = {"test": 1, "val": 2, "train": 127}
TOGETHER = 20_000_000  # Contents held at a time, 25 bytes each.


@dataclass(frozen=True, slots=True)
class Duplicates:
    counts: dict[str, int]  # images beyond the first of their content; contents across_splits, across_classes.
    extra: NDArray[np.int64]  # Rows that another row makes superfluous, in order,
    kept: NDArray[np.int64]  # and that row.


def find_duplicates(
    tables: Callable[[], Iterable[tuple[str, pa.Table]]], total: int, skipped: NDArray[np.bool_] | None = None
) -> Duplicates:
    """`tables` gives (split, table with content and label or labels) in the order of the rows, each time it is called.

    A copy in a held-out split stays before one in training; among equals the first row stays. `skipped` rows are none.
    """
    turns = -(-total // TOGETHER) or 1
    found = [_one_turn(tables(), turn, turns, skipped) for turn in range(turns)]
    extra = np.concatenate([one.extra for one in found])
    kept = np.concatenate([one.kept for one in found])
    order = np.argsort(extra)
    counts = {name: sum(one.counts[name] for one in found) for name in found[0].counts}
    return Duplicates({name: count for name, count in counts.items() if count}, extra[order], kept[order])


def _one_turn(
    tables: Iterable[tuple[str, pa.Table]], turn: int, turns: int, skipped: NDArray[np.bool_] | None
) -> Duplicates:
    columns: list[list[NDArray[Any]]] = [[] for _ in range(5)]
    places: dict[str, int] = {}
    first = 0
    for split, table in tables:
        content = _words(table["content"])
        row = np.arange(first, first + len(content))
        first += len(content)
        mine = content[:, 0] % np.uint64(turns) == turn
        if skipped is not None:
            mine &= ~skipped[row]
        # Measurements rest on what is held out; unknown splits come between val and train.
        place = RANKS.get(split) or places.setdefault(split, 3 + len(places))
        ranks = np.full(len(row), place, np.int8)
        whole: list[NDArray[Any]] = [content[:, 0], content[:, 1], row, _labels(table), ranks]
        for column, values in zip(columns, whole, strict=True):
            column.append(values[mine])
    high, low, rows, label, rank = (np.concatenate(column) for column in columns)
    ordered = np.sort(high)
    some = np.isin(high, ordered[1:][ordered[1:] == ordered[:-1]])  # Few: only these are compared in full.
    high, low, rows, label, rank = (column[some] for column in (high, low, rows, label, rank))
    order = np.lexsort((rows, rank, low, high))
    high, low, rows, label, rank = (column[order] for column in (high, low, rows, label, rank))
    starts = np.ones(len(high), np.bool_)
    starts[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    group = np.cumsum(starts) - 1
    counts = {
        "images": int((~starts).sum()),
        "across_splits": _groups_that_differ(group, rank, starts),
        "across_classes": _groups_that_differ(group, label, starts),
    }
    return Duplicates(counts, rows[~starts], rows[starts][group[~starts]])


def _groups_that_differ(group: NDArray[Any], values: NDArray[Any], starts: NDArray[np.bool_]) -> int:
    return len(np.unique(group[values != values[starts][group]]))


def _words(content: pa.ChunkedArray) -> NDArray[np.uint64]:
    """(n, 2): the 16 bytes of each content as two numbers."""
    parts = []
    for chunk in content.chunks:
        data = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * 16 : (chunk.offset + len(chunk)) * 16]
        parts.append(data.view(np.uint64).reshape(-1, 2))
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def _labels(table: pa.Table) -> NDArray[Any]:
    """A number for each label, or for each list of labels."""
    if "label" in table.column_names:
        return np.asarray(table["label"].to_numpy())
    return np.array([hash(tuple(labels)) for labels in table["labels"].to_pylist()], np.int64)
