"""How well the order law shuffles, against a full shuffle, on the worst corpus: samples sorted by class.

    python benchmarks/shuffle_quality.py [--quick]

100 classes of 1,200 images in pages of 40, batches of 256. Three figures for each number of lanes L and window G, over
the steps of one epoch: distinct classes in a batch; the chance that two images of a batch have the same class, over
that of a full shuffle (1 is perfect); and how unevenly an epoch's quarters show the classes (chi-squared over its
degrees of freedom, 1 is chance). The peers: tars of 1,000 samples in random order, through a shuffle buffer.

The last line is one JSON object: the figures of the lanes and window that the reader chooses by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipelines.reader.order import Order, choose_lanes

CLASSES, EACH, PAGE, BATCH = 100, 1200, 40, 256
SHARD = 1000
LABELS = np.repeat(np.arange(CLASSES), EACH)
Batches = Iterator[np.ndarray]


def by_law(lanes: int, window: int, seed: int) -> Batches:
    rows = np.full(len(LABELS) // PAGE, PAGE, np.int32)
    order = Order(rows, seed=seed, lanes=lanes, batch_size=BATCH, window_pages=window)
    steps = len(LABELS) // BATCH
    tapes = [
        np.concatenate([order.rows_of_window(w) for w in order.windows_of_lane(lane, 0, steps * order.rows_per_step)])
        for lane in range(lanes)
    ]
    b = order.rows_per_step
    for step in range(steps):
        yield np.concatenate([tape[step * b : step * b + b] for tape in tapes])


def by_full_shuffle(seed: int) -> Batches:
    rows = np.random.default_rng(seed).permutation(len(LABELS))
    yield from rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH)


def by_buffer(size: int, seed: int) -> Batches:
    """As webdataset and tf.data do: shards in random order, and a buffer out of which one at random is taken."""
    rng = np.random.default_rng(seed)
    source = (
        row for shard in rng.permutation(len(LABELS) // SHARD) for row in range(shard * SHARD, (shard + 1) * SHARD)
    )
    buffer: list[int] = []
    out: list[int] = []
    for row in source:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = int(rng.integers(size))
        out.append(buffer[place])
        buffer[place] = row
        if len(out) == BATCH:
            yield np.array(out)
            out = []
    out += [buffer[i] for i in rng.permutation(len(buffer))]
    for start in range(0, len(out) - BATCH + 1, BATCH):
        yield np.array(out[start : start + BATCH])


def measure(batches: Batches) -> dict[str, float]:
    distinct, same, shown = [], [], []
    for rows in batches:
        counts = np.bincount(LABELS[rows], minlength=CLASSES)
        distinct.append((counts > 0).sum())
        same.append((counts * (counts - 1)).sum() / (BATCH * (BATCH - 1)))
        shown.append(counts)
    chance = (EACH - 1) / (len(LABELS) - 1)
    quarters = [part.sum(axis=0) for part in np.array_split(np.array(shown), 4)]
    # Drawn without replacement: the variance is smaller than a multinomial's by the part that is left.
    unevenness = np.mean([((q - q.mean()) ** 2 / (q.mean() * 0.75)).sum() / (CLASSES - 1) for q in quarters])
    return {
        "distinct_classes": float(np.mean(distinct)),
        "same_class": float(np.mean(same) / chance),
        "unevenness": float(unevenness),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--output", type=Path, default=Path("bench-results/shuffle_quality.json"))
    options = parser.parse_args()
    seeds = range(1 if options.quick else 5)
    ways: dict[str, Callable[[int], Batches]] = {"full shuffle": by_full_shuffle}
    for lanes, window in ((1, 4), (4, 4), (16, 4), (64, 1), (64, 4), (64, 16)):
        ways[f"L={lanes}, G={window}"] = lambda seed, lanes=lanes, window=window: by_law(lanes, window, seed)
    for size in (1_000, 10_000):
        ways[f"buffer of {size:,}"] = lambda seed, size=size: by_buffer(size, seed)
    found = {}
    print(f"{'order':18} {'distinct classes':>17} {'same class':>11} {'unevenness':>11}")
    for name, way in ways.items():
        each = [measure(way(seed)) for seed in seeds]
        found[name] = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        distinct, same, uneven = found[name].values()
        print(f"{name:18} {distinct:17.1f} {same:11.2f} {uneven:11.2f}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1))
    chosen = found[f"L={choose_lanes(len(LABELS) // PAGE, BATCH)}, G=4"]
    full = found["full shuffle"]
    print(
        json.dumps(
            {
                "shuffle_distinct_vs_full": round(chosen["distinct_classes"] / full["distinct_classes"], 3),
                "shuffle_same_class_vs_full": round(chosen["same_class"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
