"""Memory that is used again: fresh pages from the kernel cost as much as the bytes that are written into them."""

from __future__ import annotations

import weakref
from collections import deque
from itertools import count

import numpy as np
from numpy.typing import NDArray

__all__ = ["Buffers"]

CLASS_BYTES = 1 << 20  # Sizes are rounded up to whole MiB, so that reads of nearly one size share buffers.
KEPT_BYTES = 256 << 20  # Of free buffers, of all sizes together; more than these go back to the kernel.


class Buffers:
    """Buffers that come back by themselves when nobody holds them, or any view of them, any more."""

    def __init__(self, *, pinned: bool = False) -> None:
        """`pinned`: page-locked memory, from which a GPU copies by itself."""
        self._pinned = pinned
        # A deque's append and pop are atomic: buffers come back from whatever thread drops the last view.
        self._free: dict[int, deque[memoryview]] = {}
        self._used_at: dict[int, int] = {}  # When each size was last asked for.
        self._clock = count()

    def take(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes of unknown content."""
        if size < CLASS_BYTES and not self._pinned:
            return np.empty(size, np.uint8)
        rounded = -(-size // CLASS_BYTES) * CLASS_BYTES
        free = self._free.setdefault(rounded, deque(maxlen=max(1, KEPT_BYTES // rounded)))
        self._used_at[rounded] = next(self._clock)
        try:
            memory = free.pop()
        except IndexError:
            self._give_back()
            memory = self._allocate(rounded)
        # numpy makes views of views point to the owner of the memory, if it is an array. Behind a memoryview it stops:
        # this array is what all views keep alive.
        view = np.frombuffer(memory, np.uint8, count=size)
        weakref.finalize(view, free.append, memory).atexit = False
        return view

    def _give_back(self) -> None:
        """Free buffers above the bound, of the sizes that were not asked for longest."""
        sizes = dict(self._free)
        excess = sum(size * len(free) for size, free in sizes.items()) - KEPT_BYTES
        for size in sorted(sizes, key=lambda size: self._used_at.get(size, 0)):
            while excess > 0:
                try:
                    sizes[size].popleft()
                except IndexError:
                    break
                excess -= size

    def _allocate(self, size: int) -> memoryview:
        if not self._pinned:
            return np.empty(size, np.uint8).data
        import torch

        pinned: memoryview = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data
        return pinned
