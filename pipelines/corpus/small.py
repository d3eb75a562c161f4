"""A corpus from images in memory: for notebooks, tests and small sets. No Ray, no plan, one process."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines import store
from pipelines.corpus.commit import ShardRecord, commit, current_etag, order_splits
from pipelines.corpus.images import inspect_image
from pipelines.corpus.manifest import Corpus, corpus_base
from pipelines.corpus.tables import write_table
from pipelines.corpus.tar import ShardWriter

__all__ = ["write_corpus"]


def write_corpus(
    destination: str | Path,
    images: Iterable[tuple[str, str, str, bytes]],
    *,
    class_names: Sequence[str] | None = None,
    shard_samples: int = 1000,
) -> Corpus:
    """Write (split, class name, path, image file) tuples, in this order, and open the result.

    Raises quarantine's ImageRejected for a bad image: what is in memory has been looked at before.
    """
    base = corpus_base(destination if isinstance(destination, str) else str(destination.absolute()))
    current = current_etag(base)
    everything = list(images)
    names = list(class_names) if class_names is not None else sorted({name for _, name, _, _ in everything})
    records: list[ShardRecord] = []
    for split in order_splits(split for split, _, _, _ in everything):
        rows = [(path, name, data) for own, name, path, data in everything if own == split]
        for start in range(0, len(rows), shard_samples):
            records.append(_write_shard(base, len(records), split, rows[start : start + shard_samples], names))
    return commit(base, records, class_names=names, current=current, source="memory")


def _write_shard(
    base: str, number: int, split: str, rows: Sequence[tuple[str, str, bytes]], names: Sequence[str]
) -> ShardRecord:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        with path.open("wb") as file:
            writer = ShardWriter(file)
            for source, name, data in rows:
                facts = inspect_image(data)
                writer.add(
                    path=source,
                    image=data,
                    extension=facts.extension,
                    width=facts.width,
                    height=facts.height,
                    label=names.index(name),
                )
            content = writer.close()
        name = f"{split}-{hashlib.sha256(content.sha256.encode()).hexdigest()[:12]}-{number:06d}.tar"
        etag = store.upload(path, store.join(base, "shards", name))
    relative = f"rows/{name.removesuffix('.tar')}.parquet"
    write_table(store.join(base, relative), content.rows)
    return ShardRecord(
        number=number,
        split=split,
        name=name,
        bytes=content.bytes,
        samples=content.rows.num_rows,
        sha256=content.sha256,
        etag=etag,
        page_offset=content.page_offset,
        page_length=content.page_length,
        page_rows=content.page_rows,
        rows=relative,
    )
