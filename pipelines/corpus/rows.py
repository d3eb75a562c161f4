"""The sample rows of a version: one row a sample, read by slices from the parts that its shards were written with.

A version that lists shards of other versions has no rows of its own: they are taken from there, with its labels and
shard numbers, each as often as its sample comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines import store
from pipelines.corpus.errors import ManifestError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.corpus.manifest import Corpus

__all__ = ["sample_rows", "tar_rows", "tar_times"]


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
            f"{corpus.manifest}: {table.num_rows:,} rows for {count:,} samples of {split!r}; shard again"
        )
    at = table.schema.get_field_index("sample_id")
    return table.set_column(at, "sample_id", pa.array(np.arange(first, first + count, dtype=np.int64)))


def tar_rows(corpus: Corpus, split: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Tables of what lies in the tars of a split, whether it comes or not, in manifest order."""
    shards = corpus.layout.shards_of(list(corpus.splits).index(split))
    if not corpus.head.sources:
        low, high = (int(corpus.layout.samples[:shard].sum()) for shard in (shards.start, shards.stop))
        yield from _slices(corpus, low, high, columns)
        return
    for number, first, here, count in _runs(corpus, shards):
        origin = corpus.source(number)
        labels = corpus.head.sources[number].labels
        samples = origin.layout.samples
        low = int(samples[:first].sum())
        for table in _slices(origin, low, low + int(samples[first : first + count].sum()), columns):
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
    places: dict[int, dict[str, int]] = {}
    found: list[tuple[int, int, int]] = []
    for shard in shards:
        number = 0 if layout.source is None else int(layout.source[shard])
        if number not in places:
            names = corpus.source(number).layout.name.to_pylist()
            places[number] = {name: place for place, name in enumerate(names)}
        name = layout.name[shard].as_py()
        if name not in places[number]:
            raise ManifestError(f"{corpus.source(number).reference} has no shard {name}, which {corpus.uri} lists")
        found.append((number, places[number][name], shard))
    for (number, _), run in groupby(found, key=lambda one: (one[0], one[1] - one[2])):
        together = list(run)
        yield number, together[0][1], together[0][2], len(together)


def _slices(corpus: Corpus, low: int, high: int, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """Tar rows [low, high) of a version that has rows of its own."""
    from pipelines.corpus.manifest import read_table

    folder = store.join(corpus.manifest, "samples")
    uris = [info.uri for info in store.list_objects(folder) if info.uri.endswith(".parquet")]
    firsts = [int(Path(uri).stem) for uri in uris]
    lasts = [*firsts[1:], int(corpus.layout.samples.sum())]
    given = 0
    for uri, first, last in zip(uris, firsts, lasts, strict=True):
        if first < high and last > low:
            part = read_table(uri, columns)
            part = part.slice(max(low - first, 0), min(high, last) - max(low, first))
            given += part.num_rows
            yield part
    if given != high - low:
        raise ManifestError(f"{folder}: {given:,} rows of {high - low:,}; shard again")


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
