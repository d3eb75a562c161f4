"""Records of finished shards, and many of them as one compact table: 8 bytes a page for 300,000 shards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.corpus.quarantine import Rejected

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["GROUP_SHARDS", "Records", "ShardRecord", "order_splits", "shard_pieces"]

GROUP_SHARDS = 8192  # Shards of one row group of shards.parquet.


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What one finished shard left behind; written after its tar and its rows."""

    number: int
    split: str
    name: str
    bytes: int
    samples: int
    sha256: str
    etag: str  # Of the tar in the store: a resumed run sees that it is still the one.
    page_offset: list[int]
    page_length: list[int]
    page_rows: list[int]
    rows: str  # Object with its sample rows, relative to the base.
    rejected: list[Rejected] = field(default_factory=list)
    noted: dict[str, int] = field(default_factory=dict)
    uri: str | None = None  # Where an adopted tar lies, relative to the base if below it; None: shards/NAME.
    times: int = 1  # How often each of its samples comes per epoch.

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardRecord:
        return cls(**dict(value) | {"rejected": [Rejected(**item) for item in value["rejected"]]})


def order_splits(names: Iterable[str]) -> list[str]:
    """train first, then val, then test, then others by name: the order of shards and sample ids."""
    known = ("train", "val", "test")
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


class Records:
    """Records in any order; gives them back as the shard table of a manifest, in its order, piece by piece."""

    def __init__(self, records: Iterable[ShardRecord] = ()) -> None:
        self.rejected: list[Rejected] = []
        self.noted: Counter[str] = Counter()
        self._open: list[ShardRecord] = []
        self._batches: list[pa.Table] = []
        for record in records:
            self.add(record)

    def add(self, record: ShardRecord) -> None:
        self.rejected += record.rejected
        self.noted.update(record.noted)
        if record.samples:  # A shard of which nothing was left is no shard of the corpus.
            self._open.append(record)
        if len(self._open) == GROUP_SHARDS:
            self._seal()

    def add_table(self, table: pa.Table) -> None:
        """Many at once, with the columns of `shards`."""
        self._seal()
        self._batches.append(table)

    def _seal(self) -> None:
        import pyarrow as pa

        if not self._open:
            return
        columns = {name: [getattr(record, name) for record in self._open] for name in _types()}
        columns["page_offset"] = [  # Those that follow from the lengths are not kept.
            None if offsets == _starts(lengths) else offsets
            for offsets, lengths in zip(columns["page_offset"], columns["page_length"], strict=True)
        ]
        self._batches.append(pa.table({name: pa.array(columns[name], kind) for name, kind in _types().items()}))
        self._open = []

    def ordered(self) -> tuple[list[str], pa.Table]:
        """The splits, and one row a shard in the order of the manifest: split by split, by number."""
        import pyarrow as pa
        import pyarrow.compute as pc

        self._seal()
        if not self._batches:
            return [], pa.table({name: pa.array([], kind) for name, kind in _types().items()})
        table = pa.concat_tables(self._batches)
        splits = order_splits(pc.unique(table["split"]).to_pylist())
        ranks = pc.index_in(table["split"], pa.array(splits)).to_numpy()
        order = np.lexsort((table["number"].to_numpy(), ranks))
        if (np.diff(order) != 1).any():  # Not needlessly: the copies cost as much memory as the table.
            self._batches = []
            table = table.combine_chunks().take(order)
        self._batches = [table]
        return splits, table


def shard_pieces(
    ordered: pa.Table, times: Sequence[bytes | None] | None = None, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The shard table of the manifest, or some columns of it, in pieces of GROUP_SHARDS.

    `times` is there if not every sample comes once.
    """
    names = ["name", "split", "bytes", "samples", "sha256", "page_offset", "page_length", "page_rows"]
    names += ["uri"] if ordered["uri"].null_count < ordered.num_rows else []
    names += ["times"] if times is not None else []
    if columns is not None:
        if not set(columns) <= set(names):
            return
        names = list(columns)
    import pyarrow as pa

    for start in range(0, max(ordered.num_rows, 1), GROUP_SHARDS):
        piece = ordered.slice(start, GROUP_SHARDS)
        found: dict[str, Any] = {}
        for name in names:
            if name == "page_offset":
                found[name] = _offsets(piece[name].combine_chunks(), piece["page_length"].combine_chunks())
            elif name == "page_length":
                found[name] = piece[name].cast(pa.list_(pa.int64()))
            elif name == "page_rows":
                found[name] = piece[name].cast(pa.list_(pa.int32()))
            elif name == "times" and times is not None:
                found[name] = pa.array(times[start : start + GROUP_SHARDS], pa.binary())
            else:
                found[name] = piece[name]
        yield pa.table(found)


def _offsets(given: pa.Array, lengths: pa.Array) -> pa.Array:
    """Offsets of pages, worked out for the shards that have none of their own."""
    import pyarrow as pa

    sizes = lengths.flatten().to_numpy().astype(np.int64)
    counts = lengths.value_lengths().to_numpy().astype(np.int64)
    firsts = np.cumsum(counts) - counts
    starts = np.cumsum(sizes) - sizes
    offsets = starts - np.repeat(starts[firsts] if len(starts) else starts, counts)
    for shard in np.flatnonzero(given.is_valid().to_numpy(zero_copy_only=False)).tolist():
        offsets[firsts[shard] : firsts[shard] + counts[shard]] = given[shard].as_py()
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(offsets))


def _starts(lengths: Sequence[int]) -> list[int]:
    return [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _types() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {
        "number": pa.int64(),
        "name": pa.string(),
        "split": pa.string(),
        "bytes": pa.int64(),
        "samples": pa.int32(),
        "sha256": pa.string(),
        "page_length": pa.list_(pa.uint32()),
        "page_rows": pa.list_(pa.uint16()),
        "page_offset": pa.list_(pa.int64()),
        "uri": pa.string(),
        "times": pa.int32(),
        "rows": pa.string(),
    }
