"""Where shards and pages lie, as arrays: what training needs of a manifest, compact for 300,000 shards.

shards.parquet is read in pieces, and checked against the digest of the corpus before anything of it is used. A page
costs 6 bytes here: its offset follows from the lengths before it, unless a shard has gaps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines import store
from pipelines.corpus.errors import MAKE_AGAIN, ManifestError
from pipelines.corpus.ranged import open_object
from pipelines.identity import canonical

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SCHEMA", "Layout", "digest_shards", "read_layout"]

SCHEMA = 1
Chunks = Callable[[Sequence[str]], Iterable["pa.Table"]]


@dataclass(frozen=True, slots=True)
class Layout:
    """Arrays over shards in manifest order, and over all their pages laid end to end."""

    name: pa.ChunkedArray
    uri: pa.ChunkedArray | None  # Where a tar lies that is not BASE/shards/NAME; null for one that is.
    split: NDArray[np.int32]  # Index into the splits of the head.
    bytes: NDArray[np.int64]
    samples: NDArray[np.int64]  # In the tar.
    source: NDArray[np.int32] | None  # Index into the sources of the head.
    times: pa.ChunkedArray | None  # How often each sample comes per epoch: a byte a sample, or one for all; null: once.
    first_page: NDArray[np.int64]  # Of each shard, and one more: the number of pages.
    page_rows: NDArray[np.unsignedinteger[Any]]  # Samples of the page in the tar.
    page_length: NDArray[np.unsignedinteger[Any]]
    page_offset: NDArray[np.int64] | None  # None: the pages of every shard follow one another from byte 0.

    def __len__(self) -> int:
        return len(self.samples)

    def shards_of(self, split: int) -> range:
        low, high = np.searchsorted(self.split, [split, split + 1])
        return range(int(low), int(high))

    def times_of(self, shard: int) -> NDArray[np.uint8] | None:
        """How often each sample of the tar comes per epoch; None: once each."""
        value = None if self.times is None else self.times[shard].as_py()
        if value is None:
            return None
        times = np.frombuffer(value, np.uint8)
        return np.repeat(times, self.samples[shard]) if len(times) == 1 else times


def digest_shards(
    class_names: Sequence[str],
    splits: Mapping[str, int],
    chunks: Chunks,
    *,
    multi_label: bool = False,
    label_maps: Sequence[Sequence[int] | None] = (),
) -> str:
    """sha256 over classes, splits, and each shard's sha256, split, rows, page table and times, in manifest order.

    `chunks` gives the named columns of the shard table in pieces, or nothing where it lacks one of them.
    """
    head: dict[str, Any] = {"schema": SCHEMA, "classes": list(class_names)}
    head["splits"] = [[name, count] for name, count in splits.items()]
    if multi_label:
        head["multi_label"] = True
    mapped = any(labels is not None for labels in label_maps)
    if mapped:
        head["labels"] = [None if labels is None else list(labels) for labels in label_maps]
    total = hashlib.sha256(canonical(head).encode())
    for table in chunks(["sha256", "split", "samples", *(["source"] if mapped else [])]):
        total.update("".join(_lines(table)).encode())
    for table in chunks(["page_rows"]):
        total.update(_lengths(table["page_rows"]).astype("<i8").tobytes())
    for name in ("page_offset", "page_length", "page_rows"):
        for table in chunks([name]):
            total.update(_flat(table[name]).astype("<i8").tobytes())
    shard = 0
    for table in chunks(["times"]):
        for value in table["times"].to_pylist():
            if value is not None:
                total.update(f"\n{shard} ".encode() + value)
            shard += 1
    return total.hexdigest()


def read_layout(uri: str, digest: str, class_names: Sequence[str], splits: Mapping[str, int], **more: Any) -> Layout:
    """Read shards.parquet. Raises ManifestError if it is missing, damaged, or not the one of the digest.

    `more` goes to `digest_shards`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(open_object(uri)) as file:

            def chunks(names: Sequence[str]) -> Iterable[pa.Table]:
                if set(names) <= set(file.schema_arrow.names):
                    for group in range(file.num_row_groups):
                        yield file.read_row_group(group, names).select(names)

            found = digest_shards(class_names, splits, chunks, **more)
            if found != digest:
                raise ManifestError(
                    f"{uri} is damaged: it belongs to digest {found[:12]}, not {digest[:12]}; {MAKE_AGAIN}"
                )
            return _layout(file, chunks, list(splits))
    except store.NotFound:
        raise ManifestError(f"{uri} is missing, the corpus is incomplete; {MAKE_AGAIN}") from None
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ManifestError(f"{uri} is damaged ({error}); {MAKE_AGAIN}") from None


def _layout(file: Any, chunks: Chunks, splits: Sequence[str]) -> Layout:
    import pyarrow as pa
    import pyarrow.compute as pc

    optional = [name for name in ("uri", "source", "times") if name in file.schema_arrow.names]
    shards = pa.concat_tables(chunks(["name", "split", "bytes", "samples", *optional]))
    pages, rows = [], []
    for table in chunks(["page_rows"]):
        pages.append(_lengths(table["page_rows"]))
        rows.append(_small(_flat(table["page_rows"])))
    counts = np.concatenate(pages)
    length = np.empty(int(counts.sum()), np.uint32)  # A page is 2 MiB, or one sample of at most 100 MiB and its label.
    start, has_gaps = 0, False
    for own, table in zip(pages, chunks(["page_offset", "page_length"]), strict=True):
        offset, sizes = _flat(table["page_offset"]), _flat(table["page_length"])
        has_gaps = has_gaps or not np.array_equal(offset, _starts(sizes, own))
        length[start : start + len(sizes)] = sizes
        start += len(sizes)
    # Only adopted tars have gaps, where a sample was rejected or a member belongs to none.
    offsets = [_flat(table["page_offset"]) for table in chunks(["page_offset"])] if has_gaps else []
    return Layout(
        name=shards["name"],
        uri=shards["uri"] if "uri" in optional else None,
        split=pc.index_in(shards["split"], pa.array(splits)).to_numpy().astype(np.int32),
        bytes=shards["bytes"].to_numpy().astype(np.int64),
        samples=shards["samples"].to_numpy().astype(np.int64),
        source=shards["source"].to_numpy().astype(np.int32) if "source" in optional else None,
        times=shards["times"] if "times" in optional else None,
        first_page=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        page_rows=np.concatenate(rows),
        page_length=length,
        page_offset=np.concatenate(offsets) if has_gaps else None,
    )


def _lines(table: pa.Table) -> list[str]:
    """A line for each shard, which begins with its end-of-line."""
    import pyarrow as pa
    import pyarrow.compute as pc

    words = [column.cast(pa.string()) for column in table.columns]
    lines: list[str] = pc.binary_join_element_wise("\n", pc.binary_join_element_wise(*words, " "), "").to_pylist()
    return lines


def _flat(column: pa.ChunkedArray) -> NDArray[Any]:
    import pyarrow.compute as pc

    values: NDArray[Any] = pc.list_flatten(column).to_numpy()
    return values


def _lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    return np.array(pc.list_value_length(column).to_numpy(), np.int64)


def _starts(lengths: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offset of each page if the pages of a shard follow one another."""
    ends = np.cumsum(lengths, dtype=np.int64)
    firsts = np.concatenate([[0], ends])[np.cumsum(counts) - counts]
    starts: NDArray[np.int64] = ends - lengths - np.repeat(firsts, counts)
    return starts


def _small(values: NDArray[Any]) -> NDArray[Any]:
    high = int(values.max(initial=0))
    return values.astype(np.uint16 if high < 1 << 16 else np.uint32 if high < 1 << 32 else np.uint64)
