"""`vit shard` beside a bare loop and beside Ray Data's own writer; its memory; a manifest of 303 million images.

    python benchmarks/shard.py [--quick] [--only speed scale memory manifest] [--output FILE]

Loose JPEG photos on local disk go to the embedded object store, on a warm Ray cluster, timed from `run()` to the
manifest. The bare loop is two processes that read, hash and PUT the same bytes in objects of one shard's size; with
`decode` they also decode each photo. Rounds are interleaved; a ratio is the median over the rounds.

`scale` is the same job (decode) to a local folder with one worker and with two: to the store the store itself, which
shares the cores, would be measured.

The last line is one JSON object {claim: number}: `vs_bare_loop` is the lower of header and decode, `memory_growth` the
peak at ten times the input over the peak at once, `two_workers` the rate of two workers over that of one.
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
from large_manifest import manifest  # noqa: E402

PROCESSES = 2
DISTINCT = 60  # Photos; files of one photo differ in a comment.
WARM_BYTES = 20_000_000
QUICK_BYTES = 200_000_000


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


def warm_up(work: Path) -> None:
    """Workers start, packages are imported, connections are made: a little input in several shards does it."""
    from pipelines import store

    folder = work / "warm"
    write_folders(folder, WARM_BYTES, distinct=DISTINCT)
    for number in range(2):
        shard_seconds(folder, f"warm-{number}", validate="decode", shard_bytes=WARM_BYTES // 8)
    ray_write(folder, f"{store.root()}/ray/warm")
    shutil.rmtree(folder)


def speed(folder: Path, work: Path, rounds: int, size: int, shuffle: bool) -> dict[str, float]:
    from pipelines import store
    from pipelines.corpus.manifest import open_corpus

    root = store.root()
    total = sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    tars = work / "tars"
    names = ["bare_header", "header", "bare_decode", "decode", "ray_write"]
    if shuffle:
        names.append("global_shuffle")
        shard_seconds(folder, "loose", validate="header", shard_bytes=size)
        corpus = open_corpus("loose@current")
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
    peaks = []
    for name, size in (("once", small), ("ten", 10 * small)):
        folder = work / f"memory-{name}"
        write_folders(folder, size, distinct=DISTINCT)
        with Peak() as peak:
            shard_seconds(folder, f"memory-{name}", validate=validate, shard_bytes=shard_bytes)
        shutil.rmtree(folder)
        peaks.append(peak.bytes)
        say(f"memory: {size / 1e6:,.0f} MB of photos, peak {peak.bytes / 1e6:,.0f} MB")
    return {"memory_growth": peaks[1] / peaks[0]}


def scale(folder: Path, work: Path, rounds: int, size: int) -> dict[str, float]:
    """One worker and two."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    total = sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    for number in range(rounds):
        for workers in (1, 2) if number % 2 == 0 else (2, 1):
            target = work / f"scale-{number}-{workers}"
            seconds = shard_seconds(folder, str(target), validate="decode", shard_bytes=size, num_workers=workers)
            shutil.rmtree(target)
            rates[workers].append(total / 1e6 / seconds)
        say("  ".join(f"{workers} workers {found[-1]:.0f} MB/s" for workers, found in rates.items()))
    return {"two_workers": statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))}


# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less input, one round, no manifest: about a minute")
    parser.add_argument("--only", nargs="+", choices=["speed", "scale", "memory", "manifest"], default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--output", type=Path, help="write the claims as JSON")
    options = parser.parse_args()
    parts = options.only or (["speed", "memory"] if options.quick else ["speed", "scale", "memory", "manifest"])
    claims: dict[str, float] = {}
    if "manifest" in parts:
        for images in (10**4, 10**6) if options.quick else (10**4, 10**5, 10**6, 10**7, 10**8):
            manifest(images)
        largest = manifest(303_000_000)
        claims |= {"manifest_seconds": largest["write"] + largest["open"], "manifest_mb": largest["rss"] / 1e6}
    if {"speed", "scale", "memory"} & set(parts):
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
    began = time.perf_counter()
    try:
        endpoints.ensure()
        say(f"the stack is up after {time.perf_counter() - began:.0f} s")
        warm_up(work)
        if {"speed", "scale"} & set(parts):
            folder = work / "photos"
            size, shard_bytes = (QUICK_BYTES, 10_000_000) if quick else (1_000_000_000, 50_000_000)
            write_folders(folder, size, distinct=DISTINCT)
            if "speed" in parts:
                claims |= speed(folder, work, rounds, shard_bytes, shuffle=not quick)
            if "scale" in parts:
                claims |= scale(folder, work, rounds, shard_bytes)
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
