"""`vit shard` beside a bare loop and beside Ray Data's own writer; its memory; a manifest of 303 million images.

    python benchmarks/shard.py [--quick] [--only speed memory manifest] [--output FILE]

Loose JPEG photos on local disk go to the embedded object store, on a warm Ray cluster, timed from `run()` to the
manifest. The bare loop is two processes that read, hash and PUT the same bytes in objects of one shard's size; with
`decode` they also decode each photo. Rounds are interleaved; a ratio is the median over the rounds.

The last line is one JSON object {claim: number}: `vs_bare_loop` is the lower of header and decode, `memory_growth` the
peak at ten times the input over the peak at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from inputs.photos import write_folders  # noqa: E402

PROCESSES = 2


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# The bare loop ------------------------------------------------------------------------------------------------------


def bare_worker(paths: list[str], decode: bool, size: int, prefix: str, ready: Any, start: Any) -> None:
    import simplejpeg

    from pipelines import store

    store.exists(f"{prefix}/nothing")  # Connected, as a warm worker is.
    ready.release()
    start.wait()
    data, total, number = bytearray(), hashlib.sha256(), 0
    for path in paths:
        with open(path, "rb") as file:  # noqa: PTH123
            image = file.read()
        if decode:
            simplejpeg.decode_jpeg(image, strict=True)
        total.update(image)
        data += image
        if len(data) >= size:
            store.write(f"{prefix}/{number}", bytes(data))
            data, number = bytearray(), number + 1
    if data:
        store.write(f"{prefix}/{number}", bytes(data))


def bare_loop(folder: Path, decode: bool, size: int, prefix: str) -> float:
    context = multiprocessing.get_context("spawn")
    ready, start = context.Semaphore(0), context.Event()
    paths = sorted(str(path) for path in folder.rglob("*.jpg"))
    processes = [
        context.Process(target=bare_worker, args=(paths[i::PROCESSES], decode, size, f"{prefix}-{i}", ready, start))
        for i in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    began = time.perf_counter()
    start.set()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - began
    if any(process.exitcode for process in processes):
        raise SystemExit("the bare loop failed")
    return seconds


# Ours and Ray's -----------------------------------------------------------------------------------------------------


def shard_seconds(source: Path | str, name: str, **settings: Any) -> float:
    """From run() to the manifest."""
    from pipelines import shard
    from pipelines.config import from_dict

    original, marks = shard.make_corpus, []

    def marked(*arguments: Any, **options: Any) -> Any:
        corpus = original(*arguments, **options)
        marks.append(time.perf_counter())
        return corpus

    recipe = from_dict(shard.ShardRecipe, {"source": str(source), "destination": name, **settings})
    shard.make_corpus = marked  # type: ignore[assignment]
    try:
        began = time.perf_counter()
        shard.run(recipe)
    finally:
        shard.make_corpus = original
    return marks[0] - began


def ray_write(folder: Path, prefix: str) -> float:
    """The shortest way to the same tars with Ray Data alone, headers checked by our own walk."""
    import pyarrow.fs
    import ray

    from pipelines.corpus.images import inspect_image

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        facts = inspect_image(row["bytes"])
        path = row["path"]
        key = hashlib.sha256(path.encode()).hexdigest()[:16]
        described = {"path": path, "width": facts.width, "height": facts.height}
        label = path.rsplit("/", 2)[-2].rpartition("-")[2]
        return {"__key__": key, "jpg": row["bytes"], "cls": label.encode(), "json": json.dumps(described).encode()}

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    scheme, _, address = endpoint.partition("://")
    filesystem = pyarrow.fs.S3FileSystem(
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=address,
        scheme=scheme,
        region=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
    )
    began = time.perf_counter()
    images = ray.data.read_binary_files(str(folder), include_paths=True)
    images.map(sample).write_webdataset(prefix.removeprefix("s3://"), filesystem=filesystem, encoder=None)
    return time.perf_counter() - began


def speed(folder: Path, work: Path, rounds: int, size: int, shuffle: bool) -> dict[str, float]:
    from pipelines import store
    from pipelines.corpus.manifest import open_corpus

    root = store.root()
    total = sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    shard_seconds(folder, "warm", validate="decode", shard_bytes=size)  # Workers start, packages are imported.
    ray_write(folder, f"{root}/ray/warm")
    tars = work / "tars"
    corpus = open_corpus("warm@current")
    names = ["bare_header", "header", "bare_decode", "decode", "ray_write"]
    if shuffle:
        names.append("global_shuffle")
        for shard in range(len(corpus.shards)):
            store.download(corpus.shard_uri(shard), tars / corpus.shards[shard].name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        calls: dict[str, Callable[[], float]] = {
            "bare_header": lambda n=number: bare_loop(folder, False, size, f"{root}/bare/h{n}"),  # type: ignore[misc]
            "header": lambda n=number: shard_seconds(folder, f"h{n}", validate="header", shard_bytes=size),  # type: ignore[misc]
            "bare_decode": lambda n=number: bare_loop(folder, True, size, f"{root}/bare/d{n}"),  # type: ignore[misc]
            "decode": lambda n=number: shard_seconds(folder, f"d{n}", validate="decode", shard_bytes=size),  # type: ignore[misc]
            "ray_write": lambda n=number: ray_write(folder, f"{root}/ray/{n}"),  # type: ignore[misc]
            "global_shuffle": lambda n=number: shard_seconds(  # type: ignore[misc]
                tars, f"s{n}", validate="header", shard_bytes=size, shuffle=True
            ),
        }
        for name in names if number % 2 == 0 else names[::-1]:
            seconds[name].append(calls[name]())
        say("  ".join(f"{name} {total / 1e6 / seconds[name][-1]:.0f} MB/s" for name in names))

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(one / other for one, other in zip(seconds[slow], seconds[fast], strict=True))

    claims = {
        "vs_bare_header": ratio("bare_header", "header"),
        "vs_bare_decode": ratio("bare_decode", "decode"),
        "vs_ray_write": ratio("ray_write", "header"),
    }
    claims["vs_bare_loop"] = min(claims["vs_bare_header"], claims["vs_bare_decode"])
    return claims | ({"global_shuffle": ratio("bare_header", "global_shuffle")} if shuffle else {})


# Memory -------------------------------------------------------------------------------------------------------------


class Peak:
    """Peak PSS of this process and of its cluster's workers, sampled; the servers of the stack are not ours."""

    def __init__(self) -> None:
        import ray

        address = ray.get_runtime_context().gcs_address
        self._raylets = {
            process.pid
            for process in psutil.process_iter()
            if process.name() == "raylet" and any(address in word for word in process.cmdline())
        }
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.15):
            total = 0
            for process in psutil.process_iter():
                try:
                    if process.pid == os.getpid() or process.ppid() in self._raylets:
                        total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def memory(work: Path, small: int, shard_bytes: int, validate: str) -> dict[str, float]:
    folder = work / "memory-warm"
    write_folders(folder, small // 2, distinct=60)
    shard_seconds(folder, "memory-warm", validate=validate, shard_bytes=shard_bytes // 10)
    peaks = []
    for name, size in (("once", small), ("ten", 10 * small)):
        folder = work / f"memory-{name}"
        write_folders(folder, size, distinct=60)
        with Peak() as peak:
            shard_seconds(folder, f"memory-{name}", validate=validate, shard_bytes=shard_bytes)
        shutil.rmtree(folder)
        peaks.append(peak.bytes)
        say(f"memory: {size / 1e6:,.0f} MB of photos, peak {peak.bytes / 1e6:,.0f} MB")
    return {"memory_growth": peaks[1] / peaks[0]}


# A large manifest ---------------------------------------------------------------------------------------------------


def manifest(images: int) -> dict[str, float]:
    """Write and open, in a process of its own, the manifest of so many images at 1,010 a shard and 20 a page."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_manifest, args=(images, theirs))
    process.start()
    found: dict[str, float] = ours.recv()
    process.join()
    say(
        f"manifest: {images:>11,} images  {found['pages']:>10,.0f} pages  written {found['write']:.2f} s"
        f"  opened {found['open']:.2f} s  peak {found['rss'] / 1e6:,.0f} MB  {found['size'] / 1e6:,.1f} MB on disk"
    )
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


# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less input, one round, no manifest: about a minute")
    parser.add_argument("--only", nargs="+", choices=["speed", "memory", "manifest"], default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--output", type=Path, help="write the claims as JSON")
    options = parser.parse_args()
    parts = options.only or (["speed", "memory"] if options.quick else ["speed", "memory", "manifest"])
    claims: dict[str, float] = {}
    if "manifest" in parts:
        for images in (10**4, 10**6) if options.quick else (10**4, 10**5, 10**6, 10**7, 10**8):
            manifest(images)
        largest = manifest(303_000_000)
        claims |= {"manifest_seconds": largest["write"] + largest["open"], "manifest_mb": largest["rss"] / 1e6}
    if {"speed", "memory"} & set(parts):
        claims |= on_stack(parts, options.quick, options.rounds or (1 if options.quick else 3))
    if options.output:
        options.output.write_text(json.dumps({"cores": os.cpu_count(), **claims}, indent=1))
    say(json.dumps({name: round(value, 3) for name, value in claims.items()}))


def on_stack(parts: list[str], quick: bool, rounds: int) -> dict[str, float]:
    """With an embedded stack of its own, removed afterwards."""
    from infra import endpoints
    from infra.local import stack
    from infra.local.state import State

    work = Path(tempfile.mkdtemp(prefix="vit-bench-"))
    os.environ["VIT_STATE"] = str(work / ".vit")
    for name in ("VIT_ROOT", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        os.environ.pop(name, None)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    os.environ["RAY_AUTH_MODE"] = "token"
    claims: dict[str, float] = {}
    try:
        endpoints.ensure()
        if "speed" in parts:
            folder = work / "photos"
            write_folders(folder, 200_000_000 if quick else 1_000_000_000, distinct=60)
            claims |= speed(folder, work, rounds, 10_000_000 if quick else 50_000_000, shuffle=not quick)
            shutil.rmtree(folder)
        if "memory" in parts:
            claims |= memory(work, *((10**8, 10**7, "header") if quick else (10**9, 10**8, "decode")))
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        state = State.find()
        if state is not None:
            stack.down(state, say=lambda text: None)
        shutil.rmtree(work, ignore_errors=True)
    return claims


if __name__ == "__main__":
    main()
