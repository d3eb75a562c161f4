"""A corpus as a source: its samples into new tars, shuffled over all of it. So a subset gets shards of its own.

An image is checked by the hash that its manifest has of it; its bytes stay as they are.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import TYPE_CHECKING

import numpy as np

from pipelines import store
from pipelines.corpus.entries import Entries
from pipelines.corpus.errors import SourceError
from pipelines.corpus.fetch import Planned
from pipelines.corpus.images import ImageRejected
from pipelines.corpus.selection import present
from pipelines.corpus.tar import sample_key

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus

__all__ = ["corpus_entries", "read_sample"]

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


def corpus_entries(corpus: Corpus) -> Entries:
    """One entry for each sample that comes, with how often it does."""
    from pipelines.corpus.rows import tar_rows

    entries = Entries(multi_label=corpus.head.multi_label, class_names=corpus.class_names)
    layout = corpus.layout
    repeated = _repeated(corpus)
    wanted = ["shard", "offset", "bytes", "source", "key", "content", "label", "labels"]
    for split in corpus.splits:
        times = present(corpus, split)
        first = 0
        for table in tar_rows(corpus, split, wanted):
            for row, count in zip(table.to_pylist(), times[first : first + table.num_rows].tolist(), strict=True):
                if not count:
                    continue
                shard = row["shard"]
                path = row["source"] or row["key"]
                if layout.source is not None and sample_key(path) in repeated:
                    path = f"{corpus.head.sources[int(layout.source[shard])].digest[:12]}/{path}"
                label = tuple(row["labels"]) if entries.multi_label else row["label"]
                uri, etag = corpus.shard_uri(shard), row["content"].hex()
                entries.add(path, uri, row["offset"], row["bytes"], etag, split, label)
                entries.times.append(count)
            first += table.num_rows
    return entries


def _repeated(corpus: Corpus) -> frozenset[str]:
    """Keys of the paths that several of the samples have: two corpora of a mixture may well have the same.

    All others keep their path, so that a list of images to withdraw fits the new corpus too.
    """
    from pipelines.corpus.rows import tar_rows

    if len(corpus.head.sources) < 2:
        return frozenset()
    parts = [np.empty(0, np.uint64)]
    for split in corpus.splits:
        times = present(corpus, split)
        first = 0
        for table in tar_rows(corpus, split, ["source", "key"]):
            names = zip(table["source"].to_pylist(), table["key"].to_pylist(), strict=True)
            own = np.array([int(sample_key(source or key), 16) for source, key in names], np.uint64)
            parts.append(own[times[first : first + table.num_rows] > 0])
            first += table.num_rows
    keys, counts = np.unique(np.concatenate(parts), return_counts=True)
    return frozenset(f"{key:016x}" for key in keys[counts > 1].tolist())


def read_sample(row: Planned) -> bytes | ImageRejected:
    """The image of a sample, cut out of its tar."""
    data = store.read(row.uri, row.offset, row.size)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name.lower().endswith(IMAGES) else None
                if content is not None:
                    image = content.read()
                    if hashlib.sha256(image).hexdigest()[:32] == row.etag:
                        return image
    except tarfile.TarError:
        pass
    raise SourceError(f"{row.uri}: the sample at byte {row.offset:,} is not what the manifest says; verify that corpus")
