"""Pages: runs of consecutive samples of one shard, the unit of reading. Where they end is part of the corpus digest.

A page of a subset or mixture gives only the samples that belong to it, and comes as often per epoch as its most
frequent sample: the n-th time with the samples that come at least n times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipelines.corpus.layout import Layout

__all__ = ["PAGE_BYTES", "PAGE_SAMPLES", "Page", "Pages", "close_pages"]

PAGE_BYTES = 2 << 20
PAGE_SAMPLES = 256
BLOCK = 1024  # Pages whose first row is found by adding up the rows before it in their block.
TOGETHER = 4096  # Shards whose samples are counted at a time.


def close_pages(lengths: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(offset, length, rows) of each page over consecutive samples of `lengths` bytes in the tar.

    A page takes samples while it stays within both limits; a sample that is longer than a page is a page of its own.
    """
    offsets: list[int] = []
    page_lengths: list[int] = []
    rows: list[int] = []
    position = 0
    for length in lengths:
        if not rows or rows[-1] == PAGE_SAMPLES or page_lengths[-1] + length > PAGE_BYTES:
            offsets.append(position)
            page_lengths.append(0)
            rows.append(0)
        page_lengths[-1] += length
        rows[-1] += 1
        position += length
    return offsets, page_lengths, rows


class Page(NamedTuple):
    shard: int  # Number of the shard in the manifest.
    offset: int  # Bytes from the start of the tar to the page's first header.
    length: int  # Bytes.
    tar_rows: int  # Samples that lie in it.
    rows: int  # Samples that it gives,
    chosen: tuple[int, ...] | None  # and which; None: all.
    first_row: int  # Sample id of the first one.


class Pages:
    """The pages of a split as often as they come in an epoch, in manifest order. No object per page is kept."""

    def __init__(self, layout: Layout, shards: range, first_row: int) -> None:
        """`first_row`: sample id of the split's first row."""
        self._layout = layout
        self._first_page, last_page = (int(layout.first_page[shard]) for shard in (shards.start, shards.stop))
        self._page: NDArray[np.int32] | None = None  # Page of each entry, counted from the split's first one,
        self._layer: NDArray[np.uint8] | None = None  # and which time it comes; None: each page once.
        self.rows: NDArray[np.unsignedinteger[Any]] = layout.page_rows[self._first_page : last_page]
        if layout.times is not None and layout.times[shards.start : shards.stop].null_count < len(shards):
            self._page, self._layer, self.rows = _repeats(layout, shards)
        sums = [self.rows[at : at + BLOCK].sum(dtype=np.int64) for at in range(0, len(self), BLOCK)]
        self._block_rows = first_row + np.concatenate([[0], np.cumsum(sums, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.rows)

    def useful_part(self) -> float:
        """Samples that are given, of those that lie in the pages as often as they are read."""
        rows = self._layout.page_rows[self._first_page :]
        read = (self.rows if self._page is None else rows[self._page]).sum(dtype=np.int64)
        return float(self.rows.sum(dtype=np.int64) / max(1, read))

    def __getitem__(self, entry: int) -> Page:
        layout = self._layout
        page = self._first_page + (entry if self._page is None else int(self._page[entry]))
        shard = int(np.searchsorted(layout.first_page, page, side="right")) - 1
        before = slice(int(layout.first_page[shard]), page)  # The shard's pages before this one.
        offset = layout.page_length[before].sum() if layout.page_offset is None else layout.page_offset[page]
        tar_rows = int(layout.page_rows[page])
        chosen = None
        if self._layer is not None and (times := layout.times_of(shard)) is not None:
            first = int(layout.page_rows[before].sum())
            found = np.flatnonzero(times[first : first + tar_rows] >= self._layer[entry])
            chosen = tuple(found.tolist()) if len(found) < tar_rows else None
        block = entry // BLOCK
        first_row = self._block_rows[block] + self.rows[block * BLOCK : entry].sum(dtype=np.int64)
        rows, length = int(self.rows[entry]), int(layout.page_length[page])
        return Page(shard, int(offset), length, tar_rows, rows, chosen, int(first_row))


def _repeats(layout: Layout, shards: range) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(page, layer, rows) of every time that a page of these shards comes with at least one sample."""
    found: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    first_page = int(layout.first_page[shards.start])
    for start in range(shards.start, shards.stop, TOGETHER):
        some = range(start, min(start + TOGETHER, shards.stop))
        low, high = (int(layout.first_page[shard]) for shard in (some.start, some.stop))
        sizes = layout.page_rows[low:high]
        times = np.concatenate(
            [np.ones(layout.samples[s], np.uint8) if (own := layout.times_of(s)) is None else own for s in some]
        )
        begins = np.cumsum(sizes, dtype=np.int64) - sizes
        layers = np.maximum.reduceat(times, begins)
        # The most frequent pages are few: their repeats are counted page set by page set.
        parts = []
        for layer in range(1, int(layers.max(initial=0)) + 1):
            rows = np.add.reduceat(times >= layer, begins, dtype=np.int32)
            pages = np.flatnonzero(rows)
            parts.append((pages, np.full(len(pages), layer, np.uint8), rows[pages]))
        if parts:
            page, times_so_far, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.lexsort((times_so_far, page))
            found.append(((page[order] + (low - first_page)).astype(np.int32), times_so_far[order], rows[order]))
    if not found:
        return np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.uint32)
    page, times_so_far, rows = (np.concatenate(column) for column in zip(*found, strict=True))
    return page, times_so_far, rows.astype(layout.page_rows.dtype)
