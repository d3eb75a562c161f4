"""Ray Data carries the same rows as the threads: same ids, same pixels, same errors, whatever it does to blocks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import store
from pipelines.corpus.manifest import Corpus
from pipelines.reader import blocks, executions
from pipelines.reader.blocks import rows_of_table, table_of_pixels, tables_of_files
from pipelines.reader.executions import StarvedError, check_left
from pipelines.reader.fetch import FetchError
from pipelines.reader.loader import AugmentConfig, ReaderConfig, eval_batches, train_batches
from pipelines.reader.rows import Rows

from .conftest import GREY, picture

RAY = ReaderConfig(backend="ray", num_cpus=0.25)
LOCAL = ReaderConfig(backend="local")


def some_rows(lane: int, k: int, count: int) -> Rows:
    rng = np.random.default_rng(k)
    return Rows(
        lane=lane,
        k=k,
        epoch=k // 9,
        images=rng.integers(0, 256, (count, 3, 4, 5), dtype=np.uint8),
        labels=rng.integers(0, 9, count),
        weights=rng.integers(0, 2, count).astype(np.float32),
        sample_ids=rng.integers(0, 99, count),
        faults=["", *["bad: x"] * (count - 1)],
        names=[],
        num_pages=3,
        num_bytes=1000,
        cpu_seconds=0.5,
    )


@pytest.mark.parametrize("cut", [1, 3, 7, 100])
def test_rows_survive_any_slicing_of_their_blocks(cut: int) -> None:
    pieces = [some_rows(0, 5, 6), some_rows(0, 11, 2), some_rows(2, 0, 4), some_rows(0, 20, 3)]
    table = pa.concat_tables(map(table_of_pixels, pieces))
    blocks = [table.slice(start, cut) for start in range(0, len(table), cut)]
    found = [rows for block in blocks for rows in rows_of_table(block, (3, 4, 5))]
    for name in ("images", "labels", "weights", "sample_ids"):
        whole = np.concatenate([getattr(rows, name) for rows in pieces])
        assert (np.concatenate([getattr(rows, name) for rows in found]) == whole).all()
    where = [(rows.lane, rows.k + i) for rows in pieces for i in range(len(rows))]
    assert [(rows.lane, rows.k + i) for rows in found for i in range(len(rows))] == where
    assert sum(rows.num_pages for rows in found) == 12
    assert sum(rows.cpu_seconds for rows in found) == 2.0
    assert [fault for rows in found for fault in rows.faults] == [fault for rows in pieces for fault in rows.faults]


def test_pixels_are_not_copied_into_arrow_and_back() -> None:
    rows = some_rows(0, 0, 4)
    (back,) = rows_of_table(table_of_pixels(rows), (3, 4, 5))
    assert np.shares_memory(rows.images, back.images)


def some_files(lane: int, k: int, count: int) -> Rows:
    rows = some_rows(lane, k, count)
    rows.images = [memoryview(bytes([i % 256]) * (i * 37 % 90)) for i in range(k, k + count)]
    rows.names = [f"shard, sample {i}" for i in range(k, k + count)]
    rows.versions = (("s3://a/b.tar", f"etag-{lane}"),)
    return rows


@pytest.mark.parametrize("cut", [1, 3, 7, 100])
@pytest.mark.parametrize("piece_bytes", [1, 100, 10**6])
def test_files_survive_any_slicing_of_their_blocks(cut: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_BYTES", piece_bytes)
    pieces = [some_files(0, 5, 6), some_files(0, 11, 2), some_files(2, 0, 4), some_files(0, 20, 3)]
    table = pa.concat_tables(part for piece in pieces for part in tables_of_files(piece))
    parts = [table.slice(start, cut) for start in range(0, len(table), cut)]
    found = [rows for part in parts for rows in rows_of_table(part, (3, 4, 5))]
    assert [bytes(file) for rows in found for file in rows.images] == [bytes(f) for rows in pieces for f in rows.images]
    assert [name for rows in found for name in rows.names] == [name for rows in pieces for name in rows.names]
    where = [(rows.lane, rows.k + i, rows.epoch) for rows in pieces for i in range(len(rows))]
    assert [(rows.lane, rows.k + i, rows.epoch) for rows in found for i in range(len(rows))] == where
    assert {version for rows in found for version in rows.versions} == {
        ("s3://a/b.tar", "etag-0"),
        ("s3://a/b.tar", "etag-2"),
    }
    assert sum(rows.num_pages for rows in found) == 12


@pytest.fixture
def cluster(stack: Any) -> None:
    import ray

    if not ray.is_initialized():
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")


def trace(corpus: Corpus, reader: ReaderConfig, **changes: Any) -> list[tuple[int | None, list[int], str]]:
    settings: dict[str, Any] = dict(
        batch_size=16, seed=5, spec=GREY, augment=AugmentConfig(), total_steps=60, lanes=4, window_pages=2
    )
    return [
        (batch.step, batch.sample_ids.tolist(), hashlib.sha256(batch.images.numpy().tobytes()).hexdigest())
        for batch in train_batches(corpus, reader=reader, **settings | changes)
    ]


@pytest.mark.stack
def test_ray_gives_the_batches_of_the_threads(corpus: Corpus, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executions, "TASKS_PER_EXECUTION", 3)  # A chain of several executions.
    monkeypatch.setattr(executions, "FEWEST_FILES", 20)
    monkeypatch.setattr(executions, "FEWEST_ROWS", 20)
    whole = trace(corpus, LOCAL)
    for decode in ("here", "tasks"):
        assert trace(corpus, replace(RAY, decode=decode)) == whole  # type: ignore[arg-type]
    for rank in range(2):
        ours = {"rank": rank, "world_size": 2, "start_step": 33}
        assert trace(corpus, RAY, **ours) == trace(corpus, LOCAL, **ours)


@pytest.mark.stack
def test_object_storage_gives_the_batches_of_a_folder(make_corpus: Callable[..., Corpus], cluster: None) -> None:
    files = [picture(i) for i in range(60)]
    folder = make_corpus(files)
    bucket = make_corpus(files, destination=store.join(store.root(), "corpora", "reader-test"))
    assert bucket.digest == folder.digest
    assert trace(folder, LOCAL) == trace(bucket, LOCAL) == trace(bucket, RAY)


@pytest.mark.stack
def test_ray_evaluates_what_the_threads_evaluate(corpus: Corpus, cluster: None) -> None:
    found = [
        [
            (batch.sample_ids.tolist(), batch.images.numpy().tobytes())
            for batch in eval_batches(corpus, split="test", batch_size=4, spec=GREY, reader=reader)
        ]
        for reader in (RAY, LOCAL)
    ]
    assert found[0] == found[1]


@pytest.mark.stack
def test_an_early_stop_gives_the_cpus_back(corpus: Corpus, cluster: None) -> None:
    import time

    import ray

    with train_batches(
        corpus, batch_size=16, seed=5, spec=GREY, augment=AugmentConfig(), total_steps=10**6, lanes=4, reader=RAY
    ) as batches:
        next(batches)
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.stack
def test_an_error_in_a_read_task_arrives_as_our_own(make_corpus: Callable[..., Corpus], cluster: None) -> None:
    corpus = make_corpus([picture(i) for i in range(40)])
    Path(corpus.shard_uri(1)).unlink()
    with pytest.raises(FetchError, match=f"^{corpus.shard_uri(1)} is missing, but the manifest lists it; [^\n]*$"):
        trace(corpus, RAY)


@pytest.mark.stack
def test_a_cluster_without_cpus_for_reading_is_refused_at_once(corpus: Corpus, cluster: None) -> None:
    with pytest.raises(StarvedError, match=r"none is left for a read task of 1000; give workers"):
        trace(corpus, ReaderConfig(backend="ray", num_cpus=1000))


@pytest.mark.stack
def test_cpus_that_others_hold_are_not_counted(corpus: Corpus, cluster: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"CPU": ray.cluster_resources()["CPU"] - 0.25}])
    try:
        assert group.wait(60)
        with pytest.raises(
            StarvedError, match=r"at most 0\.25 are left on one node: none is left for a read task of 1;"
        ):
            trace(corpus, ReaderConfig(backend="ray"))
        assert len(trace(corpus, RAY, total_steps=2)) == 2
    finally:
        remove_placement_group(group)


@pytest.mark.parametrize(
    ("held", "elsewhere", "is_enough"),
    [
        ({}, 0.0, True),
        ({"a": 1.5, "b": 1.5}, 0.0, False),  # One CPU over two nodes.
        ({"a": 1.0, "b": 2.0}, 0.0, True),
        ({"a": 1.4 + 0.3 + 0.3 - 1.0, "b": 2.0}, 0.0, True),
        ({"a": 1.0}, 2.0, True),
        ({"a": 1.0}, 2.5, False),
    ],
)
def test_a_read_task_needs_its_cpus_on_one_node(held: dict[str, float], elsewhere: float, is_enough: bool) -> None:
    total = {"a": 2.0, "b": 2.0}
    if is_enough:
        check_left(1.0, total, held, elsewhere)
    else:
        with pytest.raises(StarvedError, match=r"the cluster has 4 CPUs, training workers and other jobs hold 3"):
            check_left(1.0, total, held, elsewhere)
