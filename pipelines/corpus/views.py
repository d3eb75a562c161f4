"""Versions made of shards that other versions hold: nothing is copied, only the manifest is new.

A part says how often each sample of a corpus comes per epoch and what its labels become. Subsets, mixtures, withdrawn
images and grown corpora are all lists of parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.commit import Description, write_manifest
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.head import SourceVersion
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.records import order_splits

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Part", "write_view"]

PLAIN = ("name", "split", "bytes", "samples", "sha256", "page_offset", "page_length", "page_rows")


@dataclass(frozen=True, slots=True)
class Part:
    """A corpus, as often and with the labels that another version takes from it."""

    corpus: Corpus
    times: Mapping[str, NDArray[np.uint8] | None]  # By split, over the samples in its tars; None: as in the corpus.
    labels: tuple[int, ...] | None = None  # New label of each class, -1: none, and its samples come 0 times.


def write_view(base: str, parts: Sequence[Part], described: Description, rejected: Sequence[Rejected] | None) -> Corpus:
    """Write the version below `base`, without making it current. `rejected`: as for `write_manifest`."""
    import pyarrow as pa

    sources: dict[SourceVersion, int] = {}
    names = order_splits(split for part in parts for split in part.times)
    shards = [_shards(base, part, split, sources) for split in names for part in parts if split in part.times]
    table = pa.concat_tables(shards)
    if not table.num_rows:
        raise CorpusError("nothing is left: no sample comes at all")
    for column in ("uri", "times"):
        if table[column].null_count == table.num_rows:
            table = table.drop_columns([column])

    def pieces(names: Sequence[str] | None) -> list[pa.Table]:
        if names is None:
            return [table]
        return [table.select(names)] if set(names) <= set(table.column_names) else []

    return write_manifest(base, pieces, replace(described, sources=tuple(sources)), rejected)


def _shards(base: str, part: Part, split: str, sources: dict[SourceVersion, int]) -> pa.Table:
    """The shards of a split of which at least one sample comes."""
    import pyarrow as pa

    corpus, layout = part.corpus, part.corpus.layout
    shards = layout.shards_of(list(corpus.splits).index(split))
    given = part.times[split]
    ends = np.cumsum(layout.samples[shards.start : shards.stop])
    columns: dict[str, list[Any]] = {"uri": [], "source": [], "times": []}
    taken: list[int] = []
    for shard, end in zip(shards, ends.tolist(), strict=True):
        own = layout.times_of(shard) if given is None else given[end - int(layout.samples[shard]) : end]
        if own is not None and not own.any():
            continue
        taken.append(shard)
        place = corpus.shard_uri(shard).removeprefix(base.rstrip("/") + "/")
        columns["uri"].append(None if place == f"shards/{layout.name[shard].as_py()}" else place)
        columns["source"].append(sources.setdefault(_source(base, part, shard), len(sources)))
        columns["times"].append(_packed(own))
    plain = corpus.table.select(list(PLAIN)).take(pa.array(taken, pa.int64()))
    for name, kind in (("uri", pa.string()), ("source", pa.int32()), ("times", pa.binary())):
        plain = plain.append_column(name, pa.array(columns[name], kind))
    return plain


def _packed(times: NDArray[np.uint8] | None) -> bytes | None:
    """None: once each; one byte: all alike."""
    if times is None or (times == 1).all():
        return None
    return times[:1].tobytes() if (times == times[0]).all() else times.tobytes()


def _source(base: str, part: Part, shard: int) -> SourceVersion:
    """The version that holds the rows of a shard, and what its labels become."""
    corpus = part.corpus
    if not corpus.head.sources:
        return SourceVersion("" if corpus.uri == base else corpus.uri, corpus.digest, _plain(part.labels))
    number = 0 if corpus.layout.source is None else int(corpus.layout.source[shard])
    origin = corpus.head.sources[number]
    uri = origin.uri or corpus.uri
    labels = origin.labels
    if part.labels is not None:
        before = range(len(corpus.class_names)) if labels is None else labels
        labels = tuple(-1 if label < 0 else part.labels[label] for label in before)
    return SourceVersion("" if uri == base else uri, origin.digest, _plain(labels))


def _plain(labels: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if labels is None or labels == tuple(range(len(labels))) else labels
