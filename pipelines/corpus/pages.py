"""Where a page ends. Part of the corpus digest: a change here is a new schema."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PAGE_BYTES", "PAGE_SAMPLES", "close_pages"]

PAGE_BYTES = 2 << 20
PAGE_SAMPLES = 256


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
