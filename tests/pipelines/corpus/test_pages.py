from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.corpus.pages import PAGE_BYTES, PAGE_SAMPLES, close_pages

lengths = st.lists(st.integers(512, PAGE_BYTES // 3) | st.integers(1, 3 * PAGE_BYTES), max_size=600)


@given(lengths)
@example([1024] * (PAGE_SAMPLES + 1))
@example([PAGE_BYTES, 1, PAGE_BYTES + 1, 1])
def test_pages_cover_every_sample_once_and_end_as_late_as_the_limits_allow(lengths: list[int]) -> None:
    offsets, sizes, rows = close_pages(lengths)
    assert sum(rows) == len(lengths) and sum(sizes) == sum(lengths)
    first = position = 0
    for page, (offset, size, count) in enumerate(zip(offsets, sizes, rows, strict=True)):
        assert offset == position and size == sum(lengths[first : first + count]) and 1 <= count <= PAGE_SAMPLES
        assert size <= PAGE_BYTES or count == 1
        if page + 1 < len(rows):
            assert count == PAGE_SAMPLES or size + lengths[first + count] > PAGE_BYTES
        first, position = first + count, position + size
