"""Never other bytes than were put in, never more than the bound, whoever is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.manifest import Corpus
from pipelines.reader import fetch
from pipelines.reader.cache import HEADER, PART, CacheError, PageCache
from pipelines.reader.loader import AugmentConfig, ReaderConfig, train_batches

from .conftest import GREY, picture


def content(number: int) -> bytes:
    return random.Random(number).randbytes(500 + number * 37 % 1500)


def held(cache: PageCache, number: int, etag: str = "v") -> bool:
    buffer = bytearray(len(content(number)))
    if not cache.get("uri", etag, number, memoryview(buffer)):
        return False
    assert bytes(buffer) == content(number)
    return True


def put(cache: PageCache, number: int) -> None:
    cache.put("uri", "v", number, memoryview(content(number)))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "lock")


@settings(max_examples=25, deadline=None)
@given(numbers=st.lists(st.integers(0, 30), max_size=60), bound=st.integers(3_000, 30_000))
def test_what_comes_out_is_what_was_put_in_and_the_bound_holds(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], bound: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = PageCache(folder, bound)
    for number in numbers:
        if not held(cache, number):
            put(cache, number)
            assert held(cache, number)
        assert size(folder) <= bound


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    one = HEADER.size + 1000
    cache = PageCache(tmp_path, 6 * one)
    data = memoryview(bytes(1000))
    for number in range(6):
        cache.put("uri", "v", number, data)
        os.utime(cache._path("uri", "v", number, 1000), (number + 1, number + 1))
    buffer = memoryview(bytearray(1000))
    assert cache.get("uri", "v", 0, buffer)  # Which is a use.
    cache.put("uri", "v", 9, data)
    found = {number for number in (*range(6), 9) if cache.get("uri", "v", number, buffer)}
    assert found == {0, 3, 4, 5, 9}


def test_another_version_of_a_shard_is_another_page(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 100_000)
    put(cache, 1)
    assert held(cache, 1)
    assert not held(cache, 1, etag="w")


@pytest.mark.parametrize("damage", ["flip", "shorten", "empty", "magic"])
def test_damaged_files_are_not_believed(tmp_path: Path, damage: str) -> None:
    cache = PageCache(tmp_path, 100_000)
    put(cache, 4)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock")
    data = bytearray(path.read_bytes())
    match damage:
        case "flip":
            data[-7] ^= 4
        case "shorten":
            del data[-1]
        case "empty":
            data.clear()
        case "magic":
            data[0] ^= 1
    path.write_bytes(data)
    assert not held(cache, 4)
    assert not path.exists()
    put(cache, 4)
    assert held(cache, 4)


HAMMER = """
import random, sys
sys.path.insert(0, sys.argv[3])
from pipelines.reader.cache import PageCache
cache, source = PageCache(sys.argv[1], int(sys.argv[2])), random.Random(int(sys.argv[4]))
print("ready", flush=True)
while True:
    number = source.randrange(200)
    data = random.Random(number).randbytes(500 + number * 37 % 1500)
    buffer = bytearray(len(data))
    if cache.get("uri", "v", number, memoryview(buffer)):
        assert bytes(buffer) == data, number
    else:
        cache.put("uri", "v", number, memoryview(data))
"""


def test_processes_share_it_and_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    bound, root = 40_000, str(Path(__file__).parent.parent.parent.parent)
    source = random.Random(0)

    def start(seed: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HAMMER, str(tmp_path), str(bound), root, str(seed)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    processes = [start(seed) for seed in range(3)]
    try:
        for seed in range(3, 9):
            for _ in range(10):
                # With the cache's lock nothing is added; a file that is renamed between two looks is seen twice.
                assert size_while_locked(tmp_path) <= bound + 3 * 2100
                time.sleep(source.uniform(0.0, 0.03))
            victim = processes.pop(source.randrange(3))
            assert victim.poll() is None, victim.stderr and victim.stderr.read()
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            processes.append(start(seed))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    cache = PageCache(tmp_path, bound)
    assert any([held(cache, number) for number in range(200)])
    for path in tmp_path.rglob(f"*{PART}*"):
        os.utime(path, (1, 1))
    for number in range(200):
        put(cache, number)
    assert size(tmp_path) <= bound
    assert not list(tmp_path.rglob(f"*{PART}*"))


def size_while_locked(folder: Path) -> int:
    total = 0
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() and path.name != "lock" else 0
            except FileNotFoundError:
                continue
    return total


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="give a folder that can be written"):
        PageCache(tmp_path / "file" / "cache", 1000)


def test_a_disk_that_fails_costs_only_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PageCache(tmp_path, 100_000)
    folder = tmp_path / cache._path("uri", "v", 1, len(content(1))).parent.name
    folder.write_text("a file where a folder should be")
    put(cache, 1)
    assert not held(cache, 1)


def test_a_full_disk_is_told_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PageCache(tmp_path, 100_000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(PageCache, "_reserve", full)
        for number in range(9):
            put(cache, number)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    put(cache, 1)
    assert held(cache, 1)


def test_a_node_without_the_folder_reads_on_with_one_warning(
    make_corpus: Callable[..., Corpus], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_corpus([picture(i) for i in range(40)])
    folder = tmp_path / "cache"
    reader = ReaderConfig(backend="local", cache=str(folder))
    options: dict[str, Any] = dict(batch_size=8, seed=1, spec=GREY, augment=AugmentConfig(), total_steps=10, lanes=2)
    fetch._cache.cache_clear()
    stream = train_batches(corpus, reader=reader, **options)
    folder.rmdir()
    folder.write_text("")  # What another node would find.
    assert len(list(stream)) == 10
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        f"cache={folder}: File exists; give a folder that can be written; this process reads without a cache"
    ]
    with pytest.raises(CacheError, match="File exists; give a folder"):  # Where the stream is opened it is an error.
        train_batches(corpus, reader=reader, **options)


@pytest.mark.parametrize("folder", ["", "  "])
def test_a_cache_without_a_name_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="names no folder"):
        ReaderConfig(cache=folder)


def test_the_second_epoch_is_read_from_the_cache(
    make_corpus: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus([picture(i) for i in range(40)])
    reads: list[int] = []
    whole = fetch.store.read_into

    def counted(*args: Any, **options: Any) -> Any:
        reads.append(1)
        return whole(*args, **options)

    monkeypatch.setattr(fetch.store, "read_into", counted)

    def trace(cache: str | None) -> list[bytes]:
        found = train_batches(
            corpus,
            batch_size=8,
            seed=0,
            spec=GREY,
            augment=AugmentConfig(),
            total_steps=15,
            lanes=2,
            reader=ReaderConfig(backend="local", cache=cache),
        )
        return [batch.images.numpy().tobytes() for batch in found]

    plain = trace(None)
    before = len(reads)
    assert trace(str(tmp_path / "cache")) == plain
    filled = len(reads)
    assert filled - before < before
    assert trace(str(tmp_path / "cache")) == plain
    assert len(reads) == filled


def test_a_bound_without_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_bytes=5 has no effect without cache"):
        ReaderConfig(cache_bytes=5)
    with pytest.raises(ValueError, match="cache_bytes=5 holds no page"):
        ReaderConfig(cache="x", cache_bytes=5)
    assert np.isclose(ReaderConfig(cache="x").cache_bytes, 1e11)
