"""Memory comes back exactly when nobody can see it any more."""

from __future__ import annotations

import gc
import tracemalloc
from collections import deque

import numpy as np
import pytest

from pipelines.reader.buffers import CLASS_BYTES, KEPT_BYTES, Buffers

SIZE = 3 * CLASS_BYTES - 5


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_when_it_was_dropped() -> None:
    buffers = Buffers()
    first = buffers.take(SIZE)
    where = address(first)
    del first
    gc.collect()
    assert address(buffers.take(SIZE + 3)) == where


@pytest.mark.parametrize("kind", ["slice", "reshaped", "memoryview", "torch", "arrow"])
def test_any_view_keeps_the_memory(kind: str) -> None:
    import pyarrow as pa
    import torch

    buffers = Buffers()
    array = buffers.take(SIZE)
    where = address(array)
    view = {
        "slice": lambda: array[10:][5:],
        "reshaped": lambda: array[:30].reshape(5, 6)[2],
        "memoryview": lambda: array.data[7:9],
        "torch": lambda: torch.from_numpy(array[:12].reshape(3, 4))[1],
        "arrow": lambda: pa.py_buffer(array),
    }[kind]()
    del array
    gc.collect()
    assert address(buffers.take(SIZE)) != where
    del view
    gc.collect()
    assert where in {address(array) for array in [buffers.take(SIZE) for _ in range(3)]}


def test_two_holders_never_share_memory() -> None:
    buffers = Buffers()
    held = [buffers.take(SIZE) for _ in range(4)]
    for number, array in enumerate(held):
        array[:] = number
    assert [int(array.max()) for array in held] == [0, 1, 2, 3]


def test_what_is_kept_free_is_bounded_over_all_sizes() -> None:
    """Pages of large photos differ in length: 24 sizes of 256 MiB each would be 6 GiB."""
    buffers = Buffers()
    held: deque[np.ndarray] = deque(maxlen=6)
    sizes = np.random.default_rng(0).integers(2 * CLASS_BYTES, 24 * CLASS_BYTES, 600).tolist()
    tracemalloc.start()
    try:
        for size in sizes:
            held.append(buffers.take(size))
            kept = tracemalloc.get_traced_memory()[0] - sum(map(len, held))
            assert kept < KEPT_BYTES + 32 * CLASS_BYTES  # One came back since, and sizes are rounded up.
    finally:
        tracemalloc.stop()
    assert kept > KEPT_BYTES / 2


def test_a_buffer_above_the_bound_is_used_again_too() -> None:
    buffers = Buffers()
    first = buffers.take(KEPT_BYTES + 1)
    where = address(first)
    del first
    gc.collect()
    assert address(buffers.take(KEPT_BYTES + 2)) == where
