"""A manifest of many millions of images: written and opened, each size in a process of its own.

Part of `benchmarks/shard.py`, which is what is run.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["manifest"]


def manifest(images: int) -> dict[str, float]:
    """Write and open, in a process of its own, the manifest of so many images at 1,010 a shard and 20 a page."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_manifest, args=(images, theirs))
    process.start()
    found: dict[str, float] = ours.recv()
    process.join()
    sys.stdout.write(
        f"manifest: {images:>11,} images  {found['pages']:>10,.0f} pages  written {found['write']:.2f} s"
        f"  opened {found['open']:.2f} s  peak {found['rss'] / 1e6:,.0f} MB  {found['size'] / 1e6:,.1f} MB on disk\n"
    )
    sys.stdout.flush()
    return found


def _manifest(images: int, answer: Any) -> None:
    import resource

    import numpy as np
    import pyarrow as pa

    from pipelines.corpus.commit import Description, write_manifest
    from pipelines.corpus.manifest import open_corpus
    from pipelines.corpus.records import GROUP_SHARDS, Records, shard_pieces

    per_shard = min(1010, images)
    shards = max(1, images // per_shard)
    pages = -(-per_shard // 20)
    rng = np.random.default_rng(0)
    records = Records()
    for first in range(0, shards, GROUP_SHARDS):
        numbers = np.arange(first, min(first + GROUP_SHARDS, shards))
        ends = (np.arange(len(numbers) + 1) * pages).astype(np.int32)
        rows = np.full(len(numbers) * pages, 20, np.uint16)
        rows[pages - 1 :: pages] = per_shard - 20 * (pages - 1)
        lengths = rng.integers(1_900_000, 2 << 20, len(rows)).astype(np.uint32)
        count = len(numbers)
        records.add_table(
            pa.table(
                {
                    "number": pa.array(numbers, pa.int64()),
                    "name": pa.array([f"train-0123456789ab-{number:06d}.tar" for number in numbers]),
                    "split": pa.array(["train"] * count),
                    "bytes": pa.array(np.add.reduceat(lengths, ends[:-1], dtype=np.int64)),
                    "samples": pa.array(np.full(count, per_shard, np.int32)),
                    "sha256": pa.array([hashlib.sha256(b"%d" % number).hexdigest() for number in numbers]),
                    "page_length": pa.ListArray.from_arrays(ends, pa.array(lengths)),
                    "page_rows": pa.ListArray.from_arrays(ends, pa.array(rows)),
                    "page_offset": pa.nulls(count, pa.list_(pa.int64())),
                    "uri": pa.nulls(count, pa.string()),
                    "times": pa.array(np.ones(count, np.int32)),
                    "rows": pa.array([""] * count),
                }
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        _, table = records.ordered()
        made = write_manifest(
            folder,
            lambda names: shard_pieces(table, columns=names),
            Description(class_names=tuple(map(str, range(1000)))),
            [],
        )
        wrote = time.perf_counter() - began
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        del table, records
        began = time.perf_counter()
        corpus = open_corpus(made.reference)
        found = corpus.pages("train")
        assert found[len(found) - 1].first_row + int(found.rows[-1]) == shards * per_shard
        opened = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.send({"pages": len(found), "write": wrote, "open": opened, "rss": peak, "size": size})
