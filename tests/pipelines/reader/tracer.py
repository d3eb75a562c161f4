"""A consumer of its own process that writes what it was given, batch by batch: it can be killed and started again.

python -m tests.pipelines.reader.tracer JSON    (see `run`)
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.batch import Batch
from pipelines.corpus.manifest import Corpus
from pipelines.reader.loader import AugmentConfig, BatchStream, ReaderConfig, train_batches
from vit_model.preprocess import InputSpec

GREY = InputSpec(channels=1, height=12, width=12, mean=(0.5,), std=(0.5,))
BATCH, LANES = 16, 4

Row = tuple[int, int, str]  # epoch, sample id, sha256 of the pixels
Trace = list[list[Row]]  # Of each step, in any order of its rows.


def stream(corpus: Corpus, **changes: Any) -> BatchStream:
    settings: dict[str, Any] = dict(
        batch_size=BATCH,
        seed=5,
        spec=GREY,
        augment=AugmentConfig(),
        lanes=LANES,
        window_pages=2,
        reader=ReaderConfig(backend="local"),
    )
    return train_batches(corpus, **settings | changes)


def rows(batch: Batch) -> list[Row]:
    assert batch.epochs is not None
    pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
    return list(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), pixels, strict=True))


def together(ranks: Iterable[Iterable[Batch]]) -> Iterator[list[Row]]:
    """Each step's rows over all ranks, sorted."""
    for parts in zip(*ranks, strict=True):
        assert len({part.step for part in parts}) == 1
        yield sorted(row for part in parts for row in rows(part))


def run(corpus: str, trace: str, start: int, stop: int, world_size: int, backend: str) -> None:
    """All ranks of a world in this process, from the last step that the trace holds; a line a step."""
    from pipelines.corpus.manifest import open_corpus

    reader = ReaderConfig(backend=backend, num_cpus=0.25)  # type: ignore[arg-type]
    opened = open_corpus(corpus)
    ranks = [
        stream(opened, rank=rank, world_size=world_size, start_step=start, total_steps=stop, reader=reader)
        for rank in range(world_size)
    ]
    with Path(trace).open("a") as file:
        for step, found in enumerate(together(ranks), start):
            file.write(json.dumps([step, found]) + "\n")
            file.flush()


def read(trace: Path) -> Trace:
    """The steps in the trace, each once, in order; a line that the kill cut off does not count."""
    found: Trace = []
    for line in trace.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        step, step_rows = json.loads(line)
        assert step == len(found)
        found.append([(epoch, sample, pixels) for epoch, sample, pixels in step_rows])
    return found


if __name__ == "__main__":
    if (options := json.loads(sys.argv[1]))["backend"] == "ray":
        import os

        import ray

        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    run(**options)
