"""Rows as Arrow tables and back: what Ray Data carries. Images are files or pixels; nothing is pickled.

Ray Data may cut and join tables as it likes: every row bears its lane and its position on the lane's tape.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.reader.buffers import Buffers
from pipelines.reader.rows import PIECE_BYTES, Rows

__all__ = ["rows_of_table", "table_of_pixels", "tables_of_files"]

_buffers = Buffers()


def table_of_pixels(rows: Rows) -> pa.Table:
    """Decoded rows; the pixels are not copied."""
    assert not isinstance(rows.images, list)
    images = rows.images.reshape(len(rows), -1)
    pixels = pa.Array.from_buffers(pa.binary(images.shape[1]), len(rows), [None, pa.py_buffer(images)])
    return pa.table(_columns(rows) | {"image": pixels})


def tables_of_files(rows: Rows) -> Iterator[pa.Table]:
    """Rows with their files, laid end to end in tape order, a few megabytes at a time."""
    assert isinstance(rows.images, list)
    ends = np.cumsum([len(file) for file in rows.images])
    first = 0
    while first < len(rows):
        started = time.thread_time()
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + PIECE_BYTES, side="right")))
        part = rows.part(first, last)
        if not first:
            part.num_pages, part.num_bytes, part.versions = rows.num_pages, rows.num_bytes, rows.versions
            part.cpu_seconds = rows.cpu_seconds
        files = _files(part)
        part.cpu_seconds += time.thread_time() - started
        yield pa.table(_columns(part) | {"image": files, "name": pa.array(part.names, pa.string())})
        first = last


def _files(rows: Rows) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(file) for file in rows.images], out=offsets[1:])
    data = _buffers.take(int(offsets[-1])).data
    for file, start, end in zip(rows.images, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        data[start:end] = file
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_binary(), len(rows), buffers)


def _columns(rows: Rows) -> dict[str, object]:
    """All but the images. What was spent on the rows stands in the first one."""
    n = len(rows)
    first = np.arange(n) == 0
    versions = [json.dumps(rows.versions) if rows.versions else "", *[""] * (n - 1)]
    return {
        "lane": np.full(n, rows.lane, np.int32),
        "k": np.arange(rows.k, rows.k + n),
        "epoch": np.full(n, rows.epoch, np.int32),
        "sample_id": rows.sample_ids,
        "label": rows.labels if rows.labels.ndim == 1 else _lists(rows.labels),
        "weight": rows.weights,
        "fault": pa.array(rows.faults, pa.string()),
        "num_pages": first * np.int32(rows.num_pages),
        "num_bytes": first * np.int64(rows.num_bytes),
        "cpu_seconds": first * rows.cpu_seconds,
        "versions": pa.array(versions, pa.string()),
    }


def rows_of_table(table: pa.Table, shape: tuple[int, int, int]) -> Iterator[Rows]:
    """Rows of a block, cut where the lane changes or a position does not follow.

    Pixels are views into Arrow's memory. Files are copied out of it: they wait here until their step comes, and would
    hold on to the object store meanwhile.
    """
    for batch in table.to_batches():
        lanes, k, epochs = (batch[name].to_numpy() for name in ("lane", "k", "epoch"))
        cuts = np.flatnonzero((np.diff(lanes) != 0) | (np.diff(k) != 1) | (np.diff(epochs) != 0)) + 1
        for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(k)], strict=True):
            part = batch.slice(begin, end - begin)
            is_file = pa.types.is_large_binary(part["image"].type)
            yield Rows(
                lane=int(lanes[begin]),
                k=int(k[begin]),
                epoch=int(epochs[begin]),
                images=_copied(part["image"]) if is_file else _pixels(part["image"], shape),
                labels=_padded(part["label"]) if pa.types.is_list(part["label"].type) else part["label"].to_numpy(),
                weights=part["weight"].to_numpy(),
                sample_ids=part["sample_id"].to_numpy(),
                faults=part["fault"].to_pylist(),
                names=part["name"].to_pylist() if is_file else [],
                num_pages=int(part["num_pages"].to_numpy().sum()),
                num_bytes=int(part["num_bytes"].to_numpy().sum()),
                cpu_seconds=float(part["cpu_seconds"].to_numpy().sum()),
                versions=tuple(
                    (uri, etag) for text in part["versions"].to_pylist() if text for uri, etag in json.loads(text)
                ),
            )


def _lists(labels: NDArray[np.int64]) -> pa.Array:
    """Lists: tables are joined, and their rows need not be equally wide."""
    used = labels >= 0
    ends = np.cumsum(used.sum(axis=1), dtype=np.int32)
    return pa.ListArray.from_arrays(np.concatenate([np.zeros(1, np.int32), ends]), labels[used])


def _padded(column: pa.Array) -> NDArray[np.int64]:
    lengths = column.value_lengths().to_numpy()
    labels = np.full((len(column), max(1, int(lengths.max(initial=0)))), -1, np.int64)
    labels[np.arange(labels.shape[1]) < lengths[:, None]] = column.flatten().to_numpy()
    return labels


def _pixels(column: pa.Array, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    size = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], np.uint8, count=len(column) * size, offset=column.offset * size)
    return flat.reshape(len(column), *shape)


def _copied(column: pa.Array) -> list[memoryview]:
    offsets = np.frombuffer(column.buffers()[1], np.int64, count=len(column) + 1, offset=column.offset * 8)
    start, end = int(offsets[0]), int(offsets[-1])
    memory = _buffers.take(end - start)
    memory[:] = np.frombuffer(column.buffers()[2], np.uint8, count=end - start, offset=start)
    view = memory.data
    bounds = (offsets - start).tolist()
    return [view[a:b] for a, b in pairwise(bounds)]
