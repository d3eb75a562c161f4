"""Images per second from stored files to uint8 batches of 256 at 224 px on 2 cores: ours and its peers, in one run.

    python benchmarks/input_path.py [--quick] [--rounds N] [--images N] [--only NAME ...] [--no-s3]

Every contestant is a process with warm workers; rounds are interleaved, and a ratio is the median of the rounds' own
ratios, because the rate of a shared machine moves. Files are the same 500x375 JPEGs everywhere: loose for timm, tars
for the others, in a folder and in the embedded object store; the same photos as tiled JPEGs for one more of ours.
timm's transform resizes bicubically (that is what people run), ours bilinearly with antialiasing. A new stream of ours
is opened for every round, and its start counts. One core is measured by `benchmarks/decode.py`, in its own process.

The last line is one JSON object: `vs_...` is our rate over theirs, and `cpu_vs_...` their CPU time per image over ours,
which a busy machine moves less; `first_batch_seconds` is the median on a warm cluster; `plan_seconds_300m` and
`plan_mb_300m` what planning the next epoch of 3x10^8 images takes; `single_core_...` is timm's CPU time per image over
each engine's, decoding alone, and `..._like_for_like` the same with timm resizing bilinearly.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from inputs.photos import make_photos, numbered  # noqa: E402

SHARD_SAMPLES = 768
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
CLASSES = 10


def write_inputs(folder: Path, count: int, distinct: int) -> dict[str, Any]:
    """The same photos as class folders, as a corpus of tars and, where it can be made, as one of tiled JPEGs."""
    photos = make_photos(distinct)
    files = [numbered(photos[number % distinct], number) for number in range(count)]
    loose = folder / "loose"
    for number, data in enumerate(files):
        path = loose / f"class-{number % CLASSES:02d}" / f"{number:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    inputs = {"loose": str(loose), "bytes": sum(map(len, files)) / count}
    inputs["corpus"], inputs["tars"] = write_tars(folder / "corpus", files)
    tiled = tile(photos)
    if tiled is not None:
        files = [numbered(tiled[number % distinct], number) for number in range(count)]
        inputs["tiled"], _ = write_tars(folder / "tiled", files)
    return inputs


def write_tars(folder: Path, files: list[bytes]) -> tuple[str, list[str]]:
    """A corpus of the files: its reference, and its tars."""
    from pipelines.corpus.small import write_corpus

    images = [("train", f"class-{n % CLASSES:02d}", f"{n:08d}.jpg", data) for n, data in enumerate(files)]
    corpus = write_corpus(folder, images, shard_samples=SHARD_SAMPLES)
    return corpus.reference, [corpus.shard_uri(i) for i in range(len(corpus.shards))]


def tile(photos: list[bytes]) -> list[bytes] | None:
    """The photos as `vit shard --jpeg tiled` writes them; None where that was not built."""
    from PIL import Image

    from pipelines.corpus.images import ImageFacts
    from pipelines.corpus.tiled import tile_jpeg

    try:
        return [tile_jpeg(data, ImageFacts("jpg", *Image.open(io.BytesIO(data)).size)) for data in photos]
    except ImportError as error:
        print(f"no tiled JPEGs: {error}")
        return None


def copy_to_store(inputs: dict[str, Any]) -> dict[str, Any]:
    """The corpus in the object store: its reference, its tars, and addresses that need no key."""
    from pipelines import store

    base, _, digest = inputs["corpus"].rpartition("@")
    target = store.join(store.root(), "corpora", "input-path")
    for info in store.list_objects(base):
        store.upload(Path(info.uri), store.join(target, info.uri.removeprefix(base)))
    tars = [info.uri for info in store.list_objects(store.join(target, "shards"))]
    keys = [tar.removeprefix("s3://").split("/", 1) for tar in tars]
    signed = [
        store.client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=36_000)
        for bucket, key in keys
    ]
    return {"corpus": f"{target}@{digest}", "tars": tars, "signed": signed}


class Contestant:
    """A pipeline in its own process, which runs a round when told to."""

    def __init__(self, name: str, kind: str, **options: Any) -> None:
        self.name = name
        command = [sys.executable, str(Path(__file__).parent / "inputs" / "contestants.py"), kind, json.dumps(options)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self.rounds: list[dict[str, float]] = []

    def wait_ready(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith("READY"):
                return
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()} before its first round")

    def start(self, batches: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"go {batches}\n")
        self.process.stdin.flush()

    def finish(self, keep: bool) -> dict[str, float]:
        for line in self.process.stdout or ():
            if line.startswith("{"):
                result: dict[str, float] = json.loads(line)
                if keep:
                    self.rounds.append(result)
                return result
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()} in a round")

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()

    def median(self, key: str) -> float:
        return statistics.median(one[key] for one in self.rounds)


def contestants(inputs: dict[str, Any], stored: dict[str, Any] | None, only: list[str]) -> Iterator[Contestant]:
    engine = best_engine()
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "ours": ("ours", {"corpus": inputs["corpus"], "backend": "ray", "engine": engine}),
        "ours, no Ray": ("ours", {"corpus": inputs["corpus"], "backend": "local", "engine": engine}),
        "ours, decoding tasks": (
            "ours",
            {"corpus": inputs["corpus"], "backend": "ray", "engine": engine, "decode": "tasks"},
        ),
        "raw threads": ("raw_threads", {"tars": inputs["tars"], "engine": engine}),
        "timm DataLoader": ("timm_dataloader", {"folder": inputs["loose"]}),
        "webdataset": ("webdataset", {"urls": inputs["tars"]}),
        "Ray docs": ("ray_docs", {"paths": inputs["tars"]}),
    }
    if "tiled" in inputs:
        kinds["ours, tiled"] = ("ours", {"corpus": inputs["tiled"], "backend": "ray", "engine": engine})
    if stored is not None:
        kinds |= {
            "ours, S3": ("ours", {"corpus": stored["corpus"], "backend": "ray", "engine": engine}),
            "Ray docs, S3": ("ray_docs", {"paths": stored["tars"]}),
        }
        if shutil.which("curl"):
            kinds["webdataset, S3"] = ("webdataset", {"urls": [f"pipe:curl -s -f '{url}'" for url in stored["signed"]]})
    for name, (kind, options) in kinds.items():
        if not only or name in only:
            yield Contestant(name, kind, **options)


def best_engine() -> str:
    """The decode engine that the reader chooses here."""
    from pipelines.reader.engines import choose

    return choose("auto").name


def plan_cost(images: int, page_rows: int = 20) -> dict[str, float]:
    """Planning the next epoch, in a process of its own: seconds, and peak memory beside the page table itself."""
    script = f"""
import time
import numpy as np
from pipelines.reader.order import Order

def megabytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

rows = np.full({images} // {page_rows}, {page_rows}, np.uint8)
order = Order(rows, seed=0, lanes=64, batch_size=4096, window_pages=4)
before, start = megabytes("VmRSS"), time.perf_counter()
step = order.num_rows // 4096 + 64
next(order.windows(range(64), step, step + 1))
print(time.perf_counter() - start, megabytes("VmHWM") - before)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **ENVIRONMENT})
    seconds, peak = map(float, done.stdout.split())
    return {"plan_seconds_300m": round(seconds, 2), "plan_mb_300m": round(peak)}


def table(found: list[Contestant]) -> Iterator[str]:
    yield f"{'pipeline':22} {'img/s':>7} {'steady':>7} {'CPU us/img':>10} {'first s':>8} {'PSS GB':>7}"
    for one in found:
        yield (
            f"{one.name:22} {one.median('images_per_second'):7.0f} {one.median('steady_images_per_second'):7.0f} "
            f"{one.median('cpu_us_per_image'):10.0f} {one.median('first_batch_seconds'):8.2f} "
            f"{max(r['pss_bytes'] for r in one.rounds) / 1e9:7.2f}"
        )


QUICK = ["ours", "ours, tiled", "raw threads", "timm DataLoader", "webdataset", "Ray docs"]
RATIOS = {  # Claim: ours, theirs.
    "vs_raw_threads": ("ours", "raw threads"),
    "vs_timm_dataloader": ("ours", "timm DataLoader"),
    "vs_webdataset": ("ours", "webdataset"),
    "vs_ray_docs": ("ours", "Ray docs"),
    "tiled_vs_timm_dataloader": ("ours, tiled", "timm DataLoader"),
    "vs_webdataset_s3": ("ours, S3", "webdataset, S3"),
    "vs_ray_docs_s3": ("ours, S3", "Ray docs, S3"),
}


def ratios(found: list[Contestant], key: str = "images_per_second") -> dict[str, float]:
    """Our rate over each peer's (for a cost: theirs over ours), round by round, then the median."""
    by_name = {one.name: one for one in found}
    claims: dict[str, float] = {}
    for claim, names in RATIOS.items():
        us, them = (by_name.get(name) for name in names)
        if us is None or them is None:
            continue
        each = [a[key] / b[key] for a, b in zip(us.rounds, them.rounds, strict=True) if a[key] and b[key]]
        if not each:  # A round of one batch has no rate behind its first.
            continue
        claims[claim] = round(statistics.median(each if key.endswith("per_second") else [1 / one for one in each]), 3)
    return claims


def single_core(quick: bool) -> dict[str, float]:
    """Decoding alone, from `benchmarks/decode.py`."""
    command = [sys.executable, str(Path(__file__).parent / "decode.py"), *["--quick"] * quick]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **ENVIRONMENT})
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {name: value for name, value in result.items() if name.startswith("single_core_")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends within 60 s; few images, no object store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=3072, help="distinct files")
    parser.add_argument("--batches", type=int, default=24, help="batches of 256 in a round")
    parser.add_argument("--only", nargs="+", default=[], help="names of the pipelines to run")
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("bench-results/input_path.json"))
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.images, options.batches, options.no_s3 = 1, 1024, 4, True
        options.only = options.only or QUICK
    claims = single_core(options.quick)
    with tempfile.TemporaryDirectory(prefix="vit-input-path-") as name:
        folder = Path(name)
        inputs = write_inputs(folder, options.images, 48 if options.quick else 400)
        print(f"{options.images} JPEGs of {inputs['bytes'] / 1e3:.0f} KB on average; engine {best_engine()}")
        with object_store(folder, not options.no_s3) as has_store:
            stored = copy_to_store(inputs) if has_store else None
            found = list(contestants(inputs, stored, options.only))
            try:
                slow = {one.name: 4 if one.name.startswith("Ray docs") else 1 for one in found}
                for one in found:
                    one.wait_ready()
                    one.start(max(1, min(options.batches, 4) // slow[one.name]))  # Warm-up, all of them together.
                for one in found:
                    one.finish(keep=False)
                for number in range(options.rounds):
                    for one in found if number % 2 else reversed(found):
                        one.start(max(1, options.batches // slow[one.name]))
                        result = one.finish(keep=True)
                        rate, cost = result["images_per_second"], result["cpu_us_per_image"]
                        print(f"round {number + 1}, {one.name}: {rate:.0f}/s, {cost:.0f} us of CPU", flush=True)
            finally:
                for one in found:
                    one.stop()
    for line in table(found):
        print(line)
    claims |= ratios(found)
    claims |= {f"steady_{name}": value for name, value in ratios(found, "steady_images_per_second").items()}
    claims |= {f"cpu_{name}": value for name, value in ratios(found, "cpu_us_per_image").items()}
    ours = next((one for one in found if one.name == "ours"), None)
    if ours is not None:
        claims["first_batch_seconds"] = round(ours.median("first_batch_seconds"), 2)
        claims["pss_gb"] = round(max(one["pss_bytes"] for one in ours.rounds) / 1e9, 2)
    claims |= plan_cost(300_000_000)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"engine": best_engine(), "rounds": {one.name: one.rounds for one in found}, "claims": claims}
    options.output.write_text(json.dumps(content, indent=1))
    print(json.dumps(claims))


@contextlib.contextmanager
def object_store(folder: Path, wanted: bool) -> Iterator[bool]:
    """The embedded stack in a folder of its own, for as long as it is measured."""
    if not wanted:
        yield False
        return
    from infra import endpoints

    os.environ["VIT_STATE"] = str(folder / ".vit")
    os.environ["RAY_AUTH_MODE"] = "token"
    try:
        endpoints.ensure()
        yield True
    finally:
        subprocess.run([sys.executable, "-m", "pipelines", "down"], check=False, env={**os.environ, **ENVIRONMENT})
        time.sleep(1)


if __name__ == "__main__":
    main()
