"""The sample table of a version, put together from the rows that its shards left behind, a million at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from pipelines import store
from pipelines.corpus.duplicates import Duplicates, find_duplicates
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.tables import holds_table, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.corpus.records import ShardRecord

__all__ = ["RowCache", "RowParts"]

PART_ROWS = 1_000_000  # Rows of one part of the sample table.
KEPT_ROWS = 200_000  # Of a small corpus the rows are read once and kept.
THREADS = 16


class RowCache:
    """Rows of the shards of a small corpus, read as the shards are finished: so the commit need not wait for them."""

    def __init__(self, base: str, samples: int) -> None:
        """`samples`: of all shards, at most."""
        self._base = base
        self._pool = ThreadPoolExecutor(1) if samples <= KEPT_ROWS else None
        self._reading: dict[str, Future[pa.Table]] = {}

    def read_ahead(self, record: ShardRecord) -> None:
        if self._pool is not None and record.samples:
            uri = store.join(self._base, record.rows)
            self._reading[uri] = self._pool.submit(read_table, uri)

    def read(self, uri: str, columns: Sequence[str] | None) -> pa.Table:
        return self._reading[uri].result() if uri in self._reading else read_table(uri, columns)


class RowParts:
    """Rows of the shards of a version, in its order; `shards` is the ordered table of `records.Records`."""

    def __init__(self, base: str, shards: pa.Table, cache: RowCache | None = None) -> None:
        self._cache = cache or RowCache(base, 0)
        self._uris = [store.join(base, rows) for rows in shards["rows"].to_pylist()]
        self._splits: list[str] = shards["split"].to_pylist()
        self._samples: list[int] = shards["samples"].to_pylist()
        self.total = sum(self._samples)
        self._kept: list[pa.Table] = []

    def _each(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows of each shard, read ahead."""
        if self._kept:
            yield from self._kept
            return
        keep = self.total <= KEPT_ROWS
        wanted = None if keep else columns
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(self._uris), 4 * THREADS):
                read = pool.map(lambda uri: self._cache.read(uri, wanted), self._uris[start : start + 4 * THREADS])
                for table in read:
                    if keep:
                        self._kept.append(table)
                    yield table

    def duplicates(self) -> Duplicates:
        return find_duplicates(
            lambda: zip(self._splits, self._each(["content", "label", "labels"]), strict=True), self.total
        )

    def times(self, withdrawn: np.ndarray, often: Sequence[int]) -> list[bytes | None]:
        """Of each shard: how often each of its samples comes if these rows do not; None: once each.

        `often`: how often the samples of each shard came before.
        """
        ends = np.cumsum(self._samples)
        found: list[bytes | None] = []
        for end, samples, count in zip(ends.tolist(), self._samples, often, strict=True):
            own = withdrawn[np.searchsorted(withdrawn, end - samples) : np.searchsorted(withdrawn, end)]
            times = np.full(samples, count, np.uint8)
            times[own - (end - samples)] = 0
            found.append(times.tobytes() if len(own) else None if count == 1 else bytes([count]))
        return found

    def write(self, target: str, *, mend: bool = False) -> None:
        """The table in parts, each named by its first row. `mend`: only those that are not there as they should be."""
        import pyarrow as pa

        first = 0
        part: list[pa.Table] = []
        size = 0
        for shard, rows in enumerate(self._each()):
            if part and size + rows.num_rows > PART_ROWS:
                first = self._write_part(target, first, part, mend)
                part, size = [], 0
            part.append(rows.add_column(0, "shard", pa.array(np.full(rows.num_rows, shard, np.int32))))
            size += rows.num_rows
        self._write_part(target, first, part, mend)

    @staticmethod
    def _write_part(target: str, first: int, part: list[pa.Table], mend: bool) -> int:
        import pyarrow as pa

        table = pa.concat_tables(part)
        ids = np.arange(first, first + table.num_rows, dtype=np.int64)
        uri = store.join(target, "samples", f"{first:012d}.parquet")
        table = table.add_column(0, "sample_id", pa.array(ids))
        if not (mend and holds_table(uri, table)):
            write_table(uri, table)
        return first + len(ids)

    def rejected(self, duplicates: Duplicates) -> list[Rejected]:
        """The rows that duplicates make superfluous, as quarantine lists them."""
        wanted = np.unique(np.concatenate([duplicates.extra, duplicates.kept]))
        found: dict[int, tuple[str, str, str, int]] = {}
        first = 0
        for split, rows in zip(self._splits, self._each(["key", "source", "label"]), strict=True):
            own = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + rows.num_rows)]
            if len(own):
                some = rows.take(own - first)
                labels = some["label"].to_pylist() if "label" in some.column_names else [-1] * len(own)
                values = zip(some["key"].to_pylist(), some["source"].to_pylist(), labels, strict=True)
                for row, (key, source, label) in zip(own.tolist(), values, strict=True):
                    found[row] = key, source, split, label
            first += rows.num_rows
        return [
            Rejected(*found[extra], "duplicate", f"the same bytes as {found[kept][1]}")
            for extra, kept in zip(duplicates.extra.tolist(), duplicates.kept.tolist(), strict=True)
        ]
