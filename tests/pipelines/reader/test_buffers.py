"""Memory comes back exactly when nobody can see it any more."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import pipelines.reader.buffers as module
from pipelines.reader.buffers import CLASS_BYTES, Buffers

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


def test_free_memory_of_all_sizes_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 20 * CLASS_BYTES)
    buffers = Buffers()
    for size in [*range(2, 9), *range(9, 2, -1)] * 3:
        held = [buffers.take(size * CLASS_BYTES) for _ in range(3)]
        kept = sum(size * len(free) for size, free in buffers._free.items())
        assert kept <= 20 * CLASS_BYTES
        del held
