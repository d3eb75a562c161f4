"""Whether an image costs the same in the first epoch and the hundredth, and with 4 shards and 4,000.

    python benchmarks/reader_scale.py [--quick]

CPU microseconds per image of our stream without Ray, on small images, where all that is not decoding shows most. The
4,000 shards are links to four files, each with an address of its own. Rounds are interleaved; the last line is one JSON
object: later over earlier, many over few (1 is constant).
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image

from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from pipelines.reader.assemble import RowSource
from pipelines.reader.augment import AugmentConfig
from pipelines.reader.loader import _Pages
from pipelines.reader.order import Order
from pipelines.reader.rows import FetchJob, Item, Job
from pipelines.reader.stream import BatchStream
from pipelines.reader.threads import read_in_threads
from vit_model.preprocess import InputSpec

SHARDS, EACH, BATCH, LANES = 4, 1000, 256, 16
SPEC = InputSpec(channels=1, height=28, width=28, mean=(0.5,), std=(0.5,))


def write(folder: Path) -> Corpus:
    source = np.random.default_rng(0)
    images = []
    for number in range(SHARDS * EACH):
        file = io.BytesIO()
        Image.fromarray(source.integers(0, 256, (28, 28), dtype=np.uint8)).save(file, "PNG")
        images.append(("train", str(number % 10), f"{number:05d}.png", file.getvalue()))
    return write_corpus(folder / "corpus", images, shard_samples=EACH)


def stream(corpus: Corpus, links: Path, copies: int, epoch: int, steps: int) -> BatchStream:
    """Steps of an epoch over `copies` times the corpus' shards."""
    pages = corpus.pages("train")
    rows = np.tile(np.asarray(pages.rows), copies)
    order = Order(rows, seed=0, lanes=LANES, batch_size=BATCH, window_pages=4)
    locate = _Pages(corpus, pages)
    start = epoch * order.num_rows // BATCH

    def items() -> Iterator[Item]:
        for window in order.windows(range(LANES), start, start + steps):
            copied = [page.page // len(pages) for page in window.pages]
            own = dataclasses.replace(
                window,
                pages=tuple(dataclasses.replace(page, page=page.page % len(pages)) for page in window.pages),
            )
            item = locate.item(own)
            spans = [
                dataclasses.replace(span, uri=str(links / f"{number}-{Path(span.uri).name}"))
                for span, number in zip(item.pages, copied, strict=True)
            ]
            yield dataclasses.replace(item, pages=tuple(spans))

    rows_of: RowSource = read_in_threads(FetchJob(0, 10, corpus.reference), items())
    job = Job(FetchJob(0, 10), SPEC, AugmentConfig(crop="random", padding=2))
    return BatchStream(
        rows_of,
        range(LANES),
        job.shape,
        rows_per_lane=BATCH // LANES,
        start_step=start,
        stop_step=start + steps,
        job=job,
        num_threads=1,
    )


def cost(batches: BatchStream) -> float:
    """CPU microseconds per image, planning of the epoch included."""
    started, images = time.process_time(), 0
    with batches:
        for batch in batches:
            images += len(batch)
    return (time.process_time() - started) / images * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rounds, steps = (2, 60) if options.quick else (5, 120)
    cases = {
        "4 shards, epoch 1": (1, 0),
        "4 shards, epoch 100": (1, 99),
        "4,000 shards, epoch 1": (1000, 0),
        "4,000 shards, epoch 100": (1000, 99),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="vit-scale-") as name:
        folder = Path(name)
        corpus = write(folder)
        links = folder / "links"
        links.mkdir()
        for shard in range(SHARDS):
            path = Path(corpus.shard_uri(shard))
            for number in range(1000):
                os.link(path, links / f"{number}-{path.name}")
        for number in range(rounds + 1):
            for case, (copies, epoch) in cases.items():
                value = cost(stream(corpus, links, copies, epoch, steps))
                if number:
                    found[case].append(value)
    for case, values in found.items():
        print(f"{case:24} {statistics.median(values):6.1f} CPU us/image ({len(values)} rounds of {steps * BATCH:,})")

    def ratio(case: str, base: str) -> float:
        return round(statistics.median(a / b for a, b in zip(found[case], found[base], strict=True)), 3)

    print(
        json.dumps(
            {
                "cost_epoch_100_vs_1": ratio("4 shards, epoch 100", "4 shards, epoch 1"),
                "cost_4000_vs_4_shards": ratio("4,000 shards, epoch 1", "4 shards, epoch 1"),
                "cost_4000_shards_epoch_100_vs_4_shards_epoch_1": ratio("4,000 shards, epoch 100", "4 shards, epoch 1"),
            }
        )
    )


if __name__ == "__main__":
    main()
