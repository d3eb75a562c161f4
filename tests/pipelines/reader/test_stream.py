"""Whatever a backend does to the rows, the stream gives the right batches or a loud error, never others."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reader.fetch import FetchError
from pipelines.reader.order import OrderError
from pipelines.reader.rows import Rows
from pipelines.reader.stream import BatchStream

LANES, ROWS, STEPS = 3, 4, 5


def piece(lane: int, k: int, count: int) -> Rows:
    ids = np.arange(k, k + count) + 1000 * lane
    return Rows(
        lane=lane,
        k=k,
        epoch=0,
        images=np.broadcast_to(ids.astype(np.uint8)[:, None, None, None], (count, 1, 2, 2)),
        labels=ids,
        weights=np.ones(count, np.float32),
        sample_ids=ids,
        faults=[""] * count,
        names=[],
    )


def batches(pieces: Sequence[Rows], start: int = 0) -> BatchStream:
    def rows() -> Generator[Rows, None, None]:
        yield from pieces

    return BatchStream(rows(), range(LANES), (1, 2, 2), rows_per_lane=ROWS, start_step=start, stop_step=STEPS)


@st.composite
def sliced(draw: st.DrawFn) -> list[Rows]:
    """All rows of all lanes, cut anywhere, lanes mixed in any way."""
    pieces = []
    position = dict.fromkeys(range(LANES), 0)
    while open_lanes := [lane for lane, k in position.items() if k < ROWS * STEPS]:
        lane = draw(st.sampled_from(open_lanes))
        count = draw(st.integers(1, ROWS * STEPS - position[lane]))
        pieces.append(piece(lane, position[lane], count))
        position[lane] += count
    return pieces


@settings(max_examples=50)
@given(sliced())
def test_batches_do_not_depend_on_how_rows_are_cut(pieces: list[Rows]) -> None:
    for step, batch in enumerate(batches(pieces)):
        expected = [1000 * lane + step * ROWS + i for lane in range(LANES) for i in range(ROWS)]
        assert batch.step == step
        assert batch.sample_ids.tolist() == batch.labels.tolist() == expected
        assert batch.images[:, 0, 0, 0].tolist() == [i % 256 for i in expected]
    assert step == STEPS - 1


@settings(max_examples=50)
@given(sliced(), st.data())
def test_a_lost_repeated_or_swapped_piece_is_an_error(pieces: list[Rows], data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(pieces) - 1))
    match data.draw(st.sampled_from(["lost", "repeated", "swapped"])):
        case "lost":
            broken = pieces[:i] + pieces[i + 1 :]
        case "repeated":
            broken = [*pieces[: i + 1], pieces[i], *pieces[i + 1 :]]
        case _:
            same_lane = [j for j in range(i + 1, len(pieces)) if pieces[j].lane == pieces[i].lane]
            if not same_lane:
                return
            broken = list(pieces)
            broken[i], broken[same_lane[0]] = pieces[same_lane[0]], pieces[i]
    if broken[-1] is pieces[-1] and broken[:-1] == pieces[:-1]:
        return
    seen = batches(broken)
    try:
        given_steps = [batch.sample_ids.tolist() for batch in seen]
    except OrderError:
        return
    # Only what comes after the last batch may go unnoticed.
    assert given_steps == [batch.sample_ids.tolist() for batch in batches(pieces)]


def test_a_row_of_a_lane_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(OrderError, match="lane 7 gave position 0 where None had to come"):
        next(batches([piece(7, 0, 4)]))


def test_rows_of_another_step_are_an_error() -> None:
    with pytest.raises(OrderError, match="lane 0 gave position 0 where 8 had to come"):
        next(batches([piece(0, 0, 4)], start=2))


def test_an_early_end_is_an_error() -> None:
    with pytest.raises(OrderError, match="ended before step 1 of 5"):
        list(batches([piece(lane, 0, ROWS + 1) for lane in range(LANES)]))


def test_an_error_of_the_backend_reaches_the_consumer_and_closes_it() -> None:
    closed = []

    def rows() -> Generator[Rows, None, None]:
        try:
            yield piece(0, 0, 4)
            raise RuntimeError("disk on fire")
        finally:
            closed.append(True)

    stream = BatchStream(rows(), range(LANES), (1, 2, 2), rows_per_lane=ROWS, start_step=0, stop_step=STEPS)
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(stream)
    assert closed
    assert list(stream) == []


def test_a_shard_that_two_tasks_saw_in_two_versions_is_an_error() -> None:
    first, second = piece(0, 0, ROWS), piece(1, 0, ROWS)
    first.versions, second.versions = (("s3://a/b.tar", "x"),), (("s3://a/b.tar", "y"),)
    with pytest.raises(FetchError, match=r"s3://a/b\.tar was replaced while it was read"):
        next(batches([first, second, piece(2, 0, ROWS)]))


def test_a_dropped_stream_may_be_collected_by_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped, closed = threading.Event(), threading.Event()

    def rows() -> Generator[Rows, None, None]:
        try:
            yield from [piece(lane, 0, ROWS) for lane in range(LANES)]
            assert dropped.wait(60)
            gc.collect()
            yield from [piece(lane, ROWS, ROWS) for lane in range(LANES)]
        finally:
            closed.set()

    problems: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    stream = BatchStream(rows(), range(LANES), (1, 2, 2), rows_per_lane=ROWS, start_step=0, stop_step=STEPS)
    next(stream)
    gc.disable()  # In this thread.
    try:
        circle: list[Any] = [stream]
        circle.append(circle)
        del stream, circle
        dropped.set()
        assert closed.wait(60)
    finally:
        gc.enable()
    assert not problems


def test_a_stream_that_was_never_asked_closes_its_backend() -> None:
    closed = threading.Event()

    class Source:
        def __next__(self) -> Rows:
            raise AssertionError("nobody asked")

        def close(self) -> None:
            closed.set()

    stream = BatchStream(Source(), range(LANES), (1, 2, 2), rows_per_lane=ROWS, start_step=0, stop_step=STEPS)
    del stream
    gc.collect()
    assert closed.wait(60)
