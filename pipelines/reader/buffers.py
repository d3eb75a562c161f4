"""Memory that is used again: fresh pages from the kernel cost as much as the bytes that are written into them."""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

__all__ = ["Buffers"]

CLASS_BYTES = 1 << 20  # Sizes are rounded up to whole MiB, so that reads of nearly one size share buffers.
KEPT_BYTES = 256 << 20  # Of free buffers of all sizes together, or one: the rest goes back to the kernel.


class Buffers:
    """Buffers that come back by themselves when nobody holds them, or any view of them, any more."""

    def __init__(self, *, pinned: bool = False) -> None:
        """`pinned`: page-locked memory, from which a GPU copies by itself."""
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: list[memoryview] = []  # In the order in which they came back.
        # They come back wherever the last view is dropped, be it in the middle of `take`: an append needs no lock.
        self._returned: deque[memoryview] = deque()

    def take(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes of unknown content."""
        if size < CLASS_BYTES and not self._pinned:
            return np.empty(size, np.uint8)
        rounded = -(-size // CLASS_BYTES) * CLASS_BYTES
        memory = self._reuse(rounded)
        if memory is None:
            memory = self._allocate(rounded)
        # numpy makes views of views point to the owner of the memory, if it is an array. Behind a memoryview it stops:
        # this array is what all views keep alive.
        view = np.frombuffer(memory, np.uint8, count=size)
        weakref.finalize(view, self._returned.append, memory).atexit = False
        return view

    def _reuse(self, size: int) -> memoryview | None:
        """A free buffer of that size. Of the others those are given up that came back first, down to the bound."""
        found = None
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            for i in reversed(range(len(self._free))):
                if len(self._free[i]) == size:
                    found = self._free.pop(i)
                    break
            excess = sum(map(len, self._free)) - KEPT_BYTES
            while excess > 0 and len(self._free) > 1:
                excess -= len(self._free.pop(0))
        return found

    def _allocate(self, size: int) -> memoryview:
        if not self._pinned:
            return np.empty(size, np.uint8).data
        import torch

        pinned: memoryview = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data
        return pinned
