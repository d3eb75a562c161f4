"""What a source holds, as columns that stay small for many millions of images.

A sample costs about 50 bytes of memory; its path and ETag lie on disk once they are many (`Texts`).
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.errors import SourceError
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.tar import sample_key
from pipelines.corpus.texts import Texts

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Entries", "Listing"]

SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
MAX_SPLITS = 100


class Entries:
    """One entry a sample. Columns are read by iteration or by number; their order is that of the source."""

    def __init__(self, *, multi_label: bool = False, class_names: tuple[str, ...] | None = None) -> None:
        self.multi_label = multi_label
        self.class_names = class_names  # Where labels are numbers and the source names them.
        self.rejected: list[Rejected] = []
        self.ignored: Counter[str] = Counter()
        self.path = Texts()  # Relative source path: names the sample for ever.
        self.etag = Texts()
        self.offset = array("q")  # Row of an IDX file, byte in a tar, -1: the whole object.
        self.size = array("q")  # Source bytes.
        self.times = array("B")  # How often each comes per epoch, of another corpus; empty: once.
        self.keys = array("Q")  # sample_key as a number.
        self.places = array("i")  # Which of `_places` holds its bytes.
        self._places: dict[tuple[str, bool], int] = {}  # An object, or a folder in which the path leads to it.
        self._splits: dict[str | None, int] = {}
        self._split = array("b")
        self.labels: dict[Any, int] = {}  # Every label that occurs, and the code that stands for it in `codes`.
        self.codes = array("i")
        self.counts = array("i")  # With multi_label: how many of `codes` each sample has.

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, path: str, uri: str, offset: int, size: int, etag: str, split: str | None, label: Any) -> None:
        """`split`: None where the source does not say. `label`: a class name or its number, or a tuple of them."""
        self.path.append(path)
        self.etag.append(etag)
        self.offset.append(offset)
        self.size.append(size)
        self.keys.append(int(sample_key(path), 16))
        place = (uri.removesuffix(path), True) if uri.endswith(path) else (uri, False)
        self.places.append(self._places.setdefault(place, len(self._places)))
        if split not in self._splits and split is not None:
            self._check_split(split)
        self._split.append(self._splits.setdefault(split, len(self._splits)))
        if self.multi_label:
            self.counts.append(len(label))
        for one in label if self.multi_label else (label,):
            self.codes.append(self.labels.setdefault(one, len(self.labels)))

    def _check_split(self, split: str) -> None:
        """A split is part of the names of shards, so it must not lead out of their folder."""
        if not SPLIT_NAME.fullmatch(split):
            raise SourceError(f"{split[:40]!r} is no split name; lower-case letters, digits and '_'")
        if len(self._splits) >= MAX_SPLITS:
            raise SourceError(f"more than {MAX_SPLITS} splits, such as {split!r}; is that column the split?")

    def reject(self, path: str, split: str | None, reason: str, detail: str) -> None:
        shown = path.encode("utf-8", "backslashreplace").decode()
        self.rejected.append(Rejected(sample_key(path), shown, split or "", -1, reason, detail))

    @property
    def uri(self) -> Iterator[str]:
        """The object that holds each sample."""
        places = list(self._places)
        for number, path in zip(self.places, self.path, strict=True):
            yield places[number][0] + path if places[number][1] else places[number][0]

    def uris(self, rows: Iterable[int], paths: Iterable[str]) -> list[str]:
        """Of some samples, whose paths are known."""
        places = list(self._places)
        found = ((*places[self.places[row]], path) for row, path in zip(rows, paths, strict=True))
        return [head + path if is_folder else head for head, is_folder, path in found]

    @property
    def split(self) -> list[str | None]:
        names = list(self._splits)
        return [names[number] for number in self._split]

    def split_codes(self) -> tuple[list[str | None], NDArray[np.int8]]:
        """The splits that occur, and which of them each sample has."""
        return list(self._splits), np.frombuffer(self._split, np.int8)

    @property
    def label(self) -> Iterator[Any]:
        """Class name or number of each sample; with multi_label a tuple of them."""
        names = list(self.labels)
        if not self.multi_label:
            yield from (names[code] for code in self.codes)
            return
        start = 0
        for count in self.counts:
            yield tuple(names[code] for code in self.codes[start : start + count])
            start += count

    def repeated(self) -> tuple[str, str] | None:
        """Two paths of one key: the same path, if it occurs twice."""
        keys = np.sort(np.frombuffer(self.keys, np.uint64))
        twice = keys[1:][keys[1:] == keys[:-1]]
        if not len(twice):
            return None
        first, second = np.flatnonzero(np.frombuffer(self.keys, np.uint64) == twice[0])[:2].tolist()
        return self.path[first], self.path[second]

    def where(self, wanted: NDArray[np.bool_]) -> Entries:
        """Those of the samples, with what was rejected and ignored."""
        found = Entries(multi_label=self.multi_label, class_names=self.class_names)
        found.rejected, found.ignored = self.rejected, self.ignored
        columns = zip(self.path, self.uri, self.offset, self.size, self.etag, self.split, self.label, strict=True)
        for row, (is_wanted, values) in enumerate(zip(wanted.tolist(), columns, strict=True)):
            if is_wanted:
                found.add(*values)
                if self.times:
                    found.times.append(self.times[row])
        return found


@dataclass(frozen=True, slots=True)
class Listing:
    """What a plan lists: entries in the order of its shards, given out a part at a time."""

    entries: Entries
    order: np.ndarray[Any, np.dtype[np.int64]]  # Rows of the entries.
    numbers: np.ndarray[Any, np.dtype[np.int32]]  # Class number of each code.
    shard_rows: Sequence[int]

    def table(self, low: int = 0, high: int | None = None) -> pa.Table:
        """Planned rows low to high, in the order of the plan."""
        import pyarrow as pa

        entries, rows = self.entries, self.order[low:high]
        chosen = rows.tolist()
        paths = entries.path.take(chosen)
        columns = {
            "path": pa.array(paths, pa.string()),
            "uri": pa.array(entries.uris(chosen, paths), pa.string()),
            "offset": pa.array(np.frombuffer(entries.offset, np.int64)[rows]),
            "size": pa.array(np.frombuffer(entries.size, np.int64)[rows]),
            "etag": pa.array(entries.etag.take(chosen), pa.string()),
        }
        codes = np.frombuffer(entries.codes, np.int32)
        if entries.multi_label:
            ends = np.cumsum(np.frombuffer(entries.counts, np.int32), dtype=np.int64)[rows].tolist()
            counts = np.frombuffer(entries.counts, np.int32)[rows].tolist()
            lists = [sorted(self.numbers[codes[end - n : end]].tolist()) for end, n in zip(ends, counts, strict=True)]
            columns["label"] = pa.array(np.full(len(rows), -1, np.int32))
            columns["labels"] = pa.array(lists, pa.list_(pa.int32()))
        else:
            columns["label"] = pa.array(self.numbers[codes[rows]])
        return pa.table(columns)

    def shards(self) -> Iterator[pa.Table]:
        """Shard by shard: so much is in memory as text."""
        low = 0
        for rows in self.shard_rows:
            yield self.table(low, low + rows)
            low += rows
