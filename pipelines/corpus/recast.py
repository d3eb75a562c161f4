"""A corpus as a source: its samples into new tars, shuffled over all of it. So a subset gets shards of its own.

An image is checked by the hash that its manifest has of it; its bytes stay as they are.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipelines import store
from pipelines.corpus.entries import Entries
from pipelines.corpus.errors import SourceError
from pipelines.corpus.fetch import Planned
from pipelines.corpus.images import ImageRejected
from pipelines.corpus.selection import present

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus

__all__ = ["corpus_entries", "read_sample"]

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


def corpus_entries(corpus: Corpus) -> Entries:
    """One entry for each sample that comes, with how often it does: from all parts of a mixture together."""
    from pipelines.corpus.rows import tar_rows

    entries = Entries(multi_label=corpus.head.multi_label, class_names=corpus.class_names)
    layout = corpus.layout
    several = len(corpus.head.sources) > 1
    uris = [corpus.shard_uri(shard) for shard in range(len(layout))] if corpus.head.sources else []
    listed = Counter(uris)  # Parts of a mixture may share tars.
    places: dict[tuple[str, int], tuple[int, str, Any]] = {}  # Of the samples in such tars: entry, split and label.
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
                if several and layout.source is not None:  # Two corpora may well have the same paths.
                    path = f"{corpus.head.sources[int(layout.source[shard])].digest[:12]}/{path}"
                label = tuple(row["labels"]) if entries.multi_label else row["label"]
                uri, etag = corpus.shard_uri(shard), row["content"].hex()
                if listed[uri] > 1:
                    entry, *former = places.setdefault((uri, row["offset"]), (len(entries), split, label))
                    if former != [split, label]:
                        raise SourceError(
                            f"{path} comes from two parts of {corpus.reference}, with another split or label; the parts"
                            " share images: leave them out of one"
                        )
                    if entry < len(entries):
                        entries.times[entry] = _most(entries.times[entry] + count, path)
                        continue
                entries.add(path, uri, row["offset"], row["bytes"], etag, split, label)
                entries.times.append(count)
            first += table.num_rows
    return entries


def _most(times: int, path: str) -> int:
    if times > 255:
        raise SourceError(f"{path} would come {times} times per epoch, the limit is 255; choose weights less far apart")
    return times


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
