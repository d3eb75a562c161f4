"""The sample rows of a version: one row a sample, read by slices from the parts that its shards were written with.

A version that lists shards of other versions has no rows of its own: they are taken from there, with its labels and
shard numbers, each as often as its sample comes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines import store
from pipelines.corpus.errors import MAKE_AGAIN, ManifestError
from pipelines.corpus.ranged import open_object
from pipelines.corpus.tables import read_table

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.corpus.manifest import Corpus

__all__ = ["OwnRows", "sample_rows", "shard_rows", "tar_rows", "tar_times"]

GROUP_BYTES = 1 << 20  # About a row group of `tables.GROUP_ROWS`, packed.


def sample_rows(corpus: Corpus, split: str) -> pa.Table:
    """Every sample of a split as often as it comes in an epoch, in order of the sample ids."""
    import pyarrow as pa

    table = pa.concat_tables(tar_rows(corpus, split))
    times = tar_times(corpus, split)
    if times is not None:
        table = table.take(_order(corpus, split, times))
    first, count = corpus.first_sample(split), corpus.splits[split]
    if table.num_rows != count:
        raise ManifestError(
            f"{corpus.manifest}: {table.num_rows:,} rows for {count:,} samples of {split!r}; {MAKE_AGAIN}"
        )
    at = table.schema.get_field_index("sample_id")
    return table.set_column(at, "sample_id", pa.array(np.arange(first, first + count, dtype=np.int64)))


def tar_rows(corpus: Corpus, split: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Tables of what lies in the tars of a split, whether it comes or not, in manifest order."""
    shards = corpus.layout.shards_of(list(corpus.splits).index(split))
    if not corpus.head.sources:
        yield from corpus.own_rows.slices(shards.start, shards.stop, columns)
        return
    for number, first, here, count in _runs(corpus, shards):
        labels = corpus.head.sources[number].labels
        for table in corpus.source(number).own_rows.slices(first, first + count, columns):
            yield _renumbered(table, here - first, labels)


def tar_times(corpus: Corpus, split: str) -> NDArray[np.uint8] | None:
    """How often each of these rows comes per epoch; None: once each."""
    layout = corpus.layout
    shards = layout.shards_of(list(corpus.splits).index(split))
    if layout.times is None:
        return None
    times = [layout.times_of(shard) for shard in shards]
    parts = [
        np.ones(layout.samples[shard], np.uint8) if own is None else own
        for shard, own in zip(shards, times, strict=True)
    ]
    return np.concatenate([*parts, np.empty(0, np.uint8)])


def _order(corpus: Corpus, split: str, times: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Number of the tar row behind each sample id: page by page, as often as `Pages` gives it."""
    layout = corpus.layout
    shards = layout.shards_of(list(corpus.splits).index(split))
    sizes = layout.page_rows[layout.first_page[shards.start] : layout.first_page[shards.stop]]
    page = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    layers = [np.flatnonzero(times >= layer) for layer in range(1, int(times.max(initial=0)) + 1)]
    if not layers:
        return np.empty(0, np.int64)
    rows = np.concatenate(layers)
    layer = np.repeat(np.arange(len(layers), dtype=np.uint8), [len(one) for one in layers])
    return np.asarray(rows[np.lexsort((rows, layer, page[rows]))])


def _runs(corpus: Corpus, shards: range) -> Iterator[tuple[int, int, int, int]]:
    """(source, its first shard, number of that shard here, how many) of shards that follow one another there too."""
    layout = corpus.layout
    found: list[tuple[int, int, int]] = []
    for shard in shards:
        number = 0 if layout.source is None else int(layout.source[shard])
        name = layout.name[shard].as_py()
        place = corpus.source(number).own_rows.places.get(name)
        if place is None:
            raise ManifestError(f"{corpus.source(number).reference} has no shard {name}, which {corpus.uri} lists")
        found.append((number, place, shard))
    for (number, _), run in groupby(found, key=lambda one: (one[0], one[1] - one[2])):
        together = list(run)
        yield number, together[0][1], together[0][2], len(together)


class OwnRows:
    """The sample table of a version that has one: parts, each named by its first row, whose row groups are read.

    What finds a place in it is worked out once, and the last row group is kept: whoever asks for shard after shard
    (`vit verify`) reads each row group once.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._folder = store.join(corpus.manifest, "samples")
        self._uris = [info.uri for info in store.list_objects(self._folder) if info.uri.endswith(".parquet")]
        if not self._uris:
            raise ManifestError(f"{self._folder} is missing, the corpus is incomplete; {MAKE_AGAIN}")
        self._parts = [int(Path(uri).stem) for uri in self._uris]  # First row of each,
        self.starts = np.concatenate([[0], np.cumsum(corpus.layout.samples)])  # of each shard, and one more: of none.
        self._names = corpus.layout.name
        self._open: tuple[str, pq.ParquetFile] | None = None
        self._kept: tuple[str, int, pa.Table] | None = None

    @cached_property
    def places(self) -> dict[str, int]:
        """The number of each shard, by its name."""
        return {name: shard for shard, name in enumerate(self._names.to_pylist())}

    def slices(self, first: int, last: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Tar rows of the shards first to last (not included)."""
        low, high = int(self.starts[first]), int(self.starts[last])
        given = 0
        for uri, start, end in zip(self._uris, self._parts, [*self._parts[1:], int(self.starts[-1])], strict=True):
            if start < high and end > low:
                for table in self._part(uri, max(low - start, 0), min(high, end) - start, end - start, columns):
                    given += table.num_rows
                    yield table
        if given != high - low:
            raise ManifestError(f"{self._folder}: {given:,} rows of {high - low:,}; {MAKE_AGAIN}")

    def _part(self, uri: str, low: int, high: int, rows: int, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        """Rows low to high of a part of so many."""
        import pyarrow as pa

        if high - low == rows:  # In one request.
            yield read_table(uri, columns)
            return
        try:
            file = self._file(uri)
            end = 0
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if start < high and end > low:
                    table = self._group(uri, group)
                    table = table.slice(max(low - start, 0), min(high, end) - max(low, start))
                    yield table if columns is None else table.select([n for n in columns if n in table.column_names])
        except store.NotFound:
            raise ManifestError(f"{uri} is missing, the corpus is incomplete; {MAKE_AGAIN}") from None
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{uri} is damaged ({error}); {MAKE_AGAIN}") from None

    def _file(self, uri: str) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        if self._open is None or self._open[0] != uri:
            # A row group lies together: its columns come with one request.
            self._open = uri, pq.ParquetFile(io.BufferedReader(open_object(uri), GROUP_BYTES))
        return self._open[1]

    def _group(self, uri: str, number: int) -> pa.Table:
        if self._kept is None or self._kept[:2] != (uri, number):
            self._kept = uri, number, self._file(uri).read_row_group(number, use_threads=False)
        return self._kept[2]


def _renumbered(table: pa.Table, shift: int, labels: Sequence[int] | None) -> pa.Table:
    import pyarrow as pa

    def replaced(name: str, values: Any) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, values)

    if "shard" in table.column_names and shift:
        table = replaced("shard", pa.array(table["shard"].to_numpy() + np.int32(shift)))
    if labels is None:
        return table
    new = np.asarray(labels, np.int32)
    if "label" in table.column_names:
        table = replaced("label", pa.array(new[table["label"].to_numpy()]))
    if "labels" in table.column_names:
        lists = table["labels"].combine_chunks()
        ends = np.cumsum(lists.value_lengths().to_numpy().astype(np.int64))
        flat = new[lists.flatten().to_numpy()]
        kept = np.concatenate([[0], np.cumsum(flat >= 0)])
        offsets = np.concatenate([[0], kept[ends]]).astype(np.int32)
        table = replaced("labels", pa.ListArray.from_arrays(offsets, pa.array(flat[flat >= 0])))
    return table


def shard_rows(corpus: Corpus, shard: int) -> tuple[Corpus, pa.Table]:
    """What lies in one tar, and the version that wrote it: the labels are of its classes."""
    import pyarrow as pa

    origin, place = corpus, shard
    if corpus.head.sources:
        number, place, _, _ = next(_runs(corpus, range(shard, shard + 1)))
        origin = corpus.source(number)
    return origin, pa.concat_tables(origin.own_rows.slices(place, place + 1))
