"""The order law: exactly once, the same at every world size, and a resume is an integer."""

from __future__ import annotations

import resource
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reader.order import Order, OrderError, choose_lanes, generator, lanes_of_rank


@st.composite
def orders(draw: st.DrawFn) -> Order:
    rows = draw(st.lists(st.integers(1, 12), min_size=1, max_size=60))
    lanes = draw(st.sampled_from([lanes for lanes in (1, 2, 3, 4, 8, 16) if lanes <= sum(rows)]))
    return Order(
        np.array(rows, np.int32),
        seed=draw(st.integers(0, 2**40)),
        lanes=lanes,
        batch_size=lanes * draw(st.integers(2, 6)),
        window_pages=draw(st.integers(1, 6)),
    )


def tape(order: Order, lane: int, start: int, stop: int) -> np.ndarray:
    return np.concatenate([order.rows_of_window(window) for window in order.windows_of_lane(lane, start, stop)])


@given(orders())
def test_every_epoch_holds_every_row_exactly_once(order: Order) -> None:
    for epoch in range(3):
        parts = []
        for lane in range(order.lanes):
            length = order.lane_rows(lane)
            parts.append(tape(order, lane, epoch * length, (epoch + 1) * length))
        assert sorted(np.concatenate(parts)) == list(range(order.num_rows))


@given(orders())
def test_no_row_repeats_before_an_epoch_of_images_is_seen(order: Order) -> None:
    steps = order.lane_rows(order.lanes - 1) // order.rows_per_step  # the shortest lane still stands in epoch 0
    seen = [row for step in range(steps) for row in order.step_rows(step)]
    assert len(set(seen)) == len(seen)


@given(orders(), st.integers(0, 300))
def test_ranks_share_each_step_whatever_their_number(order: Order, step: int) -> None:
    whole = sorted(order.step_rows(step))
    assert len(whole) == order.batch_size
    for world_size in {1, 2, 3, order.lanes} & set(range(1, order.lanes + 1)):
        ranks = [order.step_rows(step, lanes_of_rank(order.lanes, r, world_size)) for r in range(world_size)]
        assert sorted(np.concatenate(ranks)) == whole


@settings(max_examples=40)
@given(orders(), st.integers(0, 40), st.integers(1, 12))
def test_a_resume_is_the_tail_of_the_uninterrupted_run(order: Order, start: int, steps: int) -> None:
    b, lanes = order.rows_per_step, range(order.lanes)
    tapes = {lane: tape(order, lane, 0, (start + steps) * b) for lane in lanes}
    position = dict.fromkeys(lanes, start * b)
    for window in order.windows(lanes, start, start + steps):
        assert window.k == position[window.lane]
        rows = order.rows_of_window(window)
        assert list(rows) == list(tapes[window.lane][window.k : window.k + window.count])
        position[window.lane] += window.count
    assert set(position.values()) == {(start + steps) * b}


@given(orders())
def test_windows_come_when_steps_need_them(order: Order) -> None:
    firsts = [window.k // order.rows_per_step for window in order.windows(range(order.lanes), 0, 50)]
    assert firsts == sorted(firsts)


@given(orders())
def test_an_epoch_fetches_at_most_one_more_page_per_lane_border(order: Order) -> None:
    fetched = sum(
        len(window.pages)
        for lane in range(order.lanes)
        for window in order.windows_of_lane(lane, 0, order.lane_rows(lane))
    )
    assert fetched <= order.num_pages + order.lanes - 1


@given(orders(), st.integers(0, 30))
def test_a_resume_fetches_again_at_most_one_window_per_lane(order: Order, step: int) -> None:
    windows = [next(order.windows_of_lane(lane, step * order.rows_per_step, 10**9)) for lane in range(order.lanes)]
    assert sum(len(window.pages) for window in windows) <= order.lanes * order.window_pages


@given(orders(), st.integers(0, 10**12))
def test_a_far_epoch_costs_no_more_than_the_first(order: Order, k: int) -> None:
    window = next(order.windows_of_lane(0, k, k + 1))
    assert window.epoch == k // order.lane_rows(0)
    assert window.count == 1


def test_the_order_of_a_small_corpus_never_changes() -> None:
    """Raise the VERSION of every training stage if this must change: resumed runs would see other images."""
    order = Order(np.array([3, 5, 2, 4, 6, 1, 3], np.int32), seed=7, lanes=2, batch_size=8, window_pages=2)
    assert [list(map(int, order.step_rows(step))) for step in (0, 1, 2, 3, 1000)] == GOLDEN


GOLDEN = [
    [2, 4, 0, 7, 9, 19, 18, 8],
    [1, 6, 3, 5, 13, 10, 12, 11],
    [15, 16, 14, 17, 20, 23, 22, 21],
    [3, 6, 7, 23, 16, 17, 18, 14],
    [13, 10, 17, 16, 5, 3, 22, 1],
]


@given(st.integers(1, 2000), st.integers(0, 100))
def test_the_page_order_is_the_permutation_that_the_law_names(pages: int, epoch: int) -> None:
    order = Order(np.ones(pages, np.int32), seed=3, lanes=1, batch_size=2, window_pages=1)
    assert order._epoch(epoch).pages(0, pages)[0].tolist() == generator(3, 0, epoch).permutation(pages).tolist()


@pytest.mark.parametrize(
    ("num_pages", "batch_size", "max_workers", "expected"),
    [
        (10_000, 4096, None, 64),  # the ceiling
        (235, 256, None, 8),  # 20 pages a lane
        (5, 256, None, 1),
        (5, 256, 3, 4),  # never under the workers, though pages are few
        (10_000, 96, None, 32),  # the largest power of two in 96
        (10_000, 4, None, 2),  # two images a lane
        (10_000, 7, None, 1),
    ],
)
def test_lanes_are_chosen_by_rule(num_pages: int, batch_size: int, max_workers: int | None, expected: int) -> None:
    assert choose_lanes(num_pages, batch_size, max_workers) == expected


@pytest.mark.parametrize(
    ("lanes", "batch_size", "max_workers", "words"),
    [
        (3, 256, None, "does not divide batch_size=256"),
        (64, 64, None, "at most 32 lanes"),
        (4, 256, 8, "8 workers share 4 lanes"),
        (None, 6, 4, "multiple of 8"),
        (None, 256, 200, "multiple of 512"),
    ],
)
def test_impossible_lanes_are_named_with_a_remedy(
    lanes: int | None, batch_size: int, max_workers: int | None, words: str
) -> None:
    with pytest.raises(OrderError, match=words):
        choose_lanes(1000, batch_size, max_workers, lanes)


def test_fewer_images_than_lanes_is_an_error() -> None:
    with pytest.raises(OrderError, match="at most 3 lanes"):
        Order(np.array([3]), seed=0, lanes=4, batch_size=8, window_pages=1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=2000), st.integers(0, 5))
def test_pages_are_found_by_row_as_in_the_whole_sum(rows: list[int], epoch: int) -> None:
    order = Order(np.array(rows, np.uint16), seed=1, lanes=1, batch_size=2, window_pages=1)
    plan = order._epoch(epoch)
    pages, ends = plan.pages(0, len(rows))
    assert (ends == np.cumsum(np.array(rows)[pages])).all()
    for row in range(0, sum(rows), 37):
        assert plan.place_of(row) == np.searchsorted(ends, row, side="right")
    low = len(rows) // 2
    assert (plan.pages(low, len(rows))[1] == ends[low:]).all()


def test_a_plan_for_three_hundred_million_images_is_cheap() -> None:
    rows = np.full(15_000_000, 20, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    order = Order(rows, seed=1, lanes=64, batch_size=4096, window_pages=4)
    tracemalloc.start()
    first = next(order.windows(range(64), 5 * 73_242, 10**9))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first.epoch in (4, 5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 10  # One or two epochs, on a busy machine.
    assert peak < 300e6
