"""What a reader does when a shard breaks on its way: ours beside `ray.data.read_webdataset`, fault by fault.

    python benchmarks/reader_faults.py [--quick]

A corpus of 48 JPEGs in three tars lies in the embedded object store; a proxy between reader and store breaks the wire
at each class of offset of the middle tar, or the tar itself is damaged. A reader may give the complete set, say of each
sample that it leaves out that it does, or end with an error; anything else is a silent loss. read_webdataset is run
with the raw bytes (decoder=None) and as it comes (its own decoder). The last line is one JSON object: silent losses,
wrong samples and hangs of each reader.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from tests.faults.proxy import Fault, FaultProxy  # noqa: E402
from tests.faults.reader_cases import (  # noqa: E402
    SAMPLES,
    Case,
    Outcome,
    aim,
    cases,
    places,
    read_with_ours,
    write_faults_corpus,
)

LIMIT_SECONDS = 25.0  # For one epoch of 48 small images, which takes 1 to 3 s; after that the reader hangs.
HANG = "error: hang"
DAMAGED = 1  # Number of the tar that breaks.
Reader = Callable[[Callable[[], object]], Outcome]


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:100, 0:120]
    waves = 127 + 90 * np.sin(x / 5 + number) * np.cos(y / 7)
    file = io.BytesIO()
    Image.fromarray((waves[..., None] + rng.normal(0, 12, (100, 120, 3))).clip(0, 255).astype(np.uint8)).save(
        file, "JPEG"
    )
    return file.getvalue()


def digest(value: Any) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()).hexdigest()


def ray_rows(tars: list[str], endpoint: str, decoded: bool, pipe: Any) -> None:
    """In a process of its own, because it may hang: sends (key, digest of the image) rows, then the error or None."""
    import logging

    import pyarrow.fs as fs
    import ray
    import ray.data

    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="CRITICAL")
    pipe.send("ready")
    while True:
        pipe.recv()
        filesystem = fs.S3FileSystem(endpoint_override=endpoint, region="us-east-1")
        options: dict[str, Any] = {} if decoded else {"decoder": None}
        error = None
        try:
            dataset = ray.data.read_webdataset(
                [tar.removeprefix("s3://") for tar in tars],
                filesystem=filesystem,
                override_num_blocks=len(tars),
                **options,
            )
            for row in dataset.iter_rows():
                pipe.send((row["__key__"], digest(row["jpg"])))
        except Exception as problem:
            error = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160]}"
        pipe.send(error)


class RayReader:
    """`ray.data.read_webdataset`, started again after it hung."""

    def __init__(self, tars: list[str], endpoint: str, decoded: bool) -> None:
        self._arguments = tars, endpoint, decoded
        self._process: Any = None
        self.looks: dict[str, str] | None = None

    def __call__(self, after_first: Callable[[], object]) -> Outcome:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=ray_rows, args=(*self._arguments, other), daemon=True)
            self._process.start()
            self._receive(120)
        outcome, seen = Outcome(), dict[str, str]()
        self._pipe.send("go")
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            try:
                found = self._receive(deadline - time.monotonic())
            except (TimeoutError, EOFError):
                outcome.error = f"{HANG.removeprefix('error: ')}: no end after {LIMIT_SECONDS:.0f} s"
                self._process.kill()
                self._process.join()
                self._process = None
                return outcome
            if found is None or isinstance(found, str):
                outcome.error = found or ""
                break
            key, looks = found
            if key in seen or (self.looks is not None and self.looks[key] != looks):
                outcome.wrong.add(key)
            else:
                outcome.given.add(key)
            if not seen:
                after_first()
            seen[key] = looks
        self.looks = self.looks or seen
        return outcome

    def _receive(self, seconds: float) -> Any:
        if not self._pipe.poll(max(0.0, seconds)):
            raise TimeoutError
        return self._pipe.recv()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


def run(case: Case, read: Reader, fault: Fault | None, proxy: FaultProxy, uri: str, shard: bytes) -> Outcome:
    from pipelines import store

    proxy.clear()
    if fault is not None:
        proxy.add(fault)
        return read(lambda: None)
    assert case.damage is not None
    changed = case.damage(shard)

    def damage() -> None:
        store.delete(uri) if changed is None else store.write(uri, changed)

    try:
        if not case.while_reading:
            damage()
            return read(lambda: None)
        return read(damage)
    finally:
        store.write(uri, shard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one class of offset, and only the raw decoder")
    parser.add_argument("--output", type=Path, default=Path("bench-results/reader_faults.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vit-faults-") as folder:
        os.environ["VIT_STATE"] = str(Path(folder) / ".vit")
        os.environ["RAY_AUTH_MODE"] = "token"
        from infra import endpoints

        try:
            endpoints.ensure()
            found = compare(options.quick)
        finally:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, "-m", "pipelines", "down"], check=False, env=environment)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1))
    claims: dict[str, int] = {}
    for name in next(iter(found.values())):
        words = Counter(row[name].split(":")[0] for row in found.values())
        hangs = sum(row[name].startswith(HANG) for row in found.values())
        claims |= {
            f"{name}_silent_losses": words["lost"],
            f"{name}_wrong": words["wrong content given as good"],
            f"{name}_hangs": hangs,
        }
        claims[f"{name}_cases"] = len(found)
    print(json.dumps(claims))


def compare(quick: bool) -> dict[str, dict[str, str]]:
    import pipelines.corpus.pages
    from pipelines import store
    from pipelines.reader import fetch
    from pipelines.store import s3

    pipelines.corpus.pages.PAGE_SAMPLES = 4  # Several pages a tar, though the tars are small.
    corpus = write_faults_corpus(store.join(store.root(), "corpora", "faults"), picture)
    uri = corpus.shard_uri(DAMAGED)
    shard = store.read(uri)
    tars = [corpus.shard_uri(number) for number in range(3)]
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        fetch.STALL_SECONDS, s3.ATTEMPTS = 1.0, 4
        s3._clients.clear()
        _, looks = read_with_ours(corpus, None)
        readers: dict[str, Reader] = {"ours": lambda after_first: read_with_ours(corpus, looks, after_first)[0]}
        peers = {"ray_raw": RayReader(tars, proxy.url, False)}
        if not quick:
            peers["ray_decoded"] = RayReader(tars, proxy.url, True)
        for name, peer in peers.items():
            outcome = peer(lambda: None)
            assert outcome.word == "complete" and len(outcome.given) == SAMPLES, f"{name}: {outcome}"
        readers |= peers
        offsets = places(shard, corpus)
        found: dict[str, dict[str, str]] = {}
        for case in cases(shard, offsets):
            if quick and case.times == 1 and case.kind not in (None, "unavailable") and case.where != "inside an image":
                continue
            row = found[str(case)] = {}
            for name, read in readers.items():
                fault = None
                if case.kind is not None:
                    # Ours asks for one page at a time, read_webdataset for the whole tar.
                    whole = Fault(case.kind, method="GET", match=uri.rsplit("/", 1)[-1], after=case.offset)
                    whole.times = case.times
                    fault = aim(case, corpus) if name == "ours" else whole
                outcome = run(case, read, fault, proxy, uri, shard)
                row[name] = str(outcome)
                if fault is not None and not proxy.hits:
                    row[name] += " (no request met the fault)"
            print(f"{case!s:45} " + " | ".join(f"{name}: {text}" for name, text in row.items()), flush=True)
        for peer in peers.values():
            peer.close()
    return found


if __name__ == "__main__":
    main()
