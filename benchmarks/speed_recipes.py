"""The speed options of training at equal compute: what is each worth on the corpora of the demo?

    python benchmarks/speed_recipes.py [--corpus fashion-mnist|digits] [--quick] [--steps 150] [--seeds 0 1 2]
        [--only NAME ...] [--resume] [--data FOLDER]

Compute is counted in multiply-accumulates: an option that makes a step cheaper takes more steps, so that every run
spends what `--steps` steps of the plain recipe spend. Width 64, depth 4, patch 4, 28 px, mean pooling, the demo's
optimizer (Muon 0.02, AdamW 2e-3), cosine, batch 128, one thread. Fashion-MNIST: mirrored, top-1 on the 10,000 test
photos. Digits: scikit-learn's 1,797 at 28 px, not mirrored, top-1 on 399 that are held out. Differences to the plain
recipe are paired by seed; "±" is the standard error over the seeds. CPU seconds are those of the training alone. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipelines.batch import Batch
from pipelines.corpus.samples import fashion_mnist
from pipelines.training.build import build_state
from pipelines.training.config import MuonAdamW, PackingConfig, ProgressiveConfig, TrainConfig
from pipelines.training.loop import Hooks, LoopConfig, train
from pipelines.training.parallel import Ranks
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.sizes import draw_sizes, size_at
from pipelines.training.validation import validate
from vit_model import InputSpec, ViTConfig, build_model, forward_macs, normalize

CLASSES, SIDE, BATCH = 10, 28, 128
SPEC = InputSpec(channels=1, height=SIDE, width=SIDE, mean=(0.5,), std=(0.5,))
MODEL = ViTConfig(
    resolution=SIDE, patch_size=4, channels=1, width=64, depth=4, mlp_dim=256, num_heads=2, pool="gap"
)  # fmt: skip
OPTIMIZER = MuonAdamW(peak_lr=0.02, adamw_lr=2e-3, weight_decay=0.05)
DROP_PATH = 0.2
HELD_OUT_DIGITS = 399
STEPS = {"fashion-mnist": 150, "digits": 110}  # A third of an epoch; ten epochs.


@dataclass(frozen=True, slots=True)
class Option:
    """What differs from the plain recipe, and the MACs of an image, in the mean over a run."""

    model: ViTConfig
    train: dict[str, Any]
    macs: float


def read(folder: Path, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, 1, 28, 28) and labels of `train` or `t10k`."""
    import gzip

    images = np.frombuffer(gzip.decompress((folder / f"{kind}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{kind}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return torch.tensor(images).view(-1, 1, SIDE, SIDE), torch.tensor(labels).long()


def read_fashion(folder: Path | None) -> tuple[torch.Tensor, ...]:
    """Training images and labels, then those of the test split."""
    if folder is None:
        folder, told = fashion_mnist(Path(".vit") / "samples")
        print(told)
    return (*read(folder, "train"), *read(folder, "t10k"))


def read_digits() -> tuple[torch.Tensor, ...]:
    """scikit-learn's digits at 28 px, in an order drawn once: training images and labels, then 399 held-out ones."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = torch.tensor(found.images * 15.9375, dtype=torch.float32)[:, None]  # (N, 1, 8, 8), 17 levels to 0..255.
    large = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear").round().clamp(0, 255).byte()
    labels = torch.tensor(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:-HELD_OUT_DIGITS], order[-HELD_OUT_DIGITS:]
    return large[train], labels[train], large[test], labels[test]


def macs_of(config: ViTConfig, height: int, width: int) -> int:
    return forward_macs(config, CLASSES, resolution=(height, width))


def options() -> dict[str, Option]:
    plain = macs_of(MODEL, SIDE, SIDE)
    patches = (SIDE // MODEL.patch_size) ** 2
    embedding = patches * MODEL.patch_size**2 * MODEL.width
    head = MODEL.width * CLASSES

    def blocks(tokens: int) -> int:
        one = tokens * (4 * MODEL.width**2 + 2 * MODEL.width * MODEL.mlp_dim) + 2 * tokens**2 * MODEL.width
        return MODEL.depth * one

    progressive, packing = ProgressiveConfig(), PackingConfig()
    growing = [size_at(progressive, step, 1000, (SIDE, SIDE), MODEL.patch_size) for step in range(1000)]
    many = torch.arange(5000)
    nothing = torch.zeros(len(many), 1, SIDE, SIDE, dtype=torch.uint8)
    drawn = draw_sizes(packing, Batch(nothing, many, many, many), 0, MODEL.patch_size).tolist()
    dropped = [1 - int(DROP_PATH * i / (MODEL.depth - 1) * BATCH) / BATCH for i in range(MODEL.depth)]
    half = embedding + blocks(round(patches / 2)) + head
    return {
        "plain": Option(MODEL, {}, plain),
        "patch dropout 0.5": Option(replace(MODEL, patch_dropout=0.5), {}, half),
        "progressive 0.5 to 1": Option(
            MODEL, {"progressive": progressive}, statistics.mean(macs_of(MODEL, *size) for size in growing)
        ),
        "packing 0.5 to 1": Option(
            MODEL, {"packing": packing}, statistics.mean(macs_of(MODEL, *size) for size in drawn)
        ),
        "drop path 0.2": Option(
            replace(MODEL, drop_path=DROP_PATH), {}, embedding + blocks(patches) * statistics.mean(dropped) + head
        ),
    }


def batches(images: torch.Tensor, labels: torch.Tensor, seed: int, mirror: bool) -> Iterator[Batch]:
    """Endless: an own permutation of each epoch; `mirror`: half of the images."""
    step, ones = 0, torch.ones(BATCH)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1 << 30):
        order = torch.randperm(len(images), generator=generator)
        for ids in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
            mirrored = torch.rand(BATCH, generator=generator) < (0.5 if mirror else 0.0)
            chosen = torch.where(mirrored[:, None, None, None], images[ids].flip(3), images[ids])
            yield Batch(chosen, labels[ids], ones, ids, step, torch.full((BATCH,), epoch))
            step += 1


def measure(option: Option, steps: int, seed: int, data: tuple[torch.Tensor, ...], mirror: bool) -> tuple[float, float]:
    """Top-1 and CPU seconds of one run."""
    config = TrainConfig(batch_size=BATCH, total_steps=steps, **option.train)
    state = build_state(build_model(option.model, CLASSES, seed=seed), config, OPTIMIZER, Ranks())
    schedule = ScheduleConfig(warmup_steps=max(1, steps // 10))
    loop = LoopConfig(
        train=config, schedule=schedule, peak_lr=OPTIMIZER.peak_lr, total_steps=steps, seed=seed, log_every_steps=10**9
    )

    def prepare(images: torch.Tensor) -> torch.Tensor:
        return normalize(images, SPEC)

    started = time.process_time()
    train(state, batches(data[0], data[1], seed, mirror), loop, Ranks(), prepare, Hooks())
    seconds = time.process_time() - started
    held_out = (
        Batch(part, of, torch.ones(len(part)), torch.arange(len(part)))
        for part, of in zip(data[2].split(500), data[3].split(500), strict=True)
    )
    return validate(state.model, held_out, config, prepare, Ranks(), CLASSES).top1, seconds


def spread(values: list[float]) -> str:
    """Mean, and its standard error where there are several."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends within 60 s; too short to say anything")
    parser.add_argument("--corpus", choices=list(STEPS), default="fashion-mnist")
    parser.add_argument("--steps", type=int, default=None, help="of the plain recipe; default 150, for the digits 110")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default 0 1 2")
    parser.add_argument("--only", nargs="+", default=None, help="these options; gains need plain")
    parser.add_argument("--resume", action="store_true", help="take over what bench-results holds of the same runs")
    parser.add_argument("--data", type=Path, default=None, help="folder of the four IDX files; default: as the demo")
    args = parser.parse_args()
    torch.set_num_threads(1)
    budget = args.steps or (12 if args.quick else STEPS[args.corpus])
    seeds = args.seeds or ([0, 1] if args.quick else [0, 1, 2])
    data = read_digits() if args.corpus == "digits" else read_fashion(args.data)
    if args.quick:
        data = (*data[:2], data[2][:2000], data[3][:2000])
    chosen = {name: option for name, option in options().items() if not args.only or name in args.only}
    plain = options()["plain"].macs
    steps = {name: round(budget * plain / option.macs) for name, option in chosen.items()}
    results = Path("bench-results") / "speed_recipes.json"
    results.parent.mkdir(exist_ok=True)
    done: dict[str, list[float]] = json.loads(results.read_text()) if args.resume and results.exists() else {}
    for seed in seeds:
        for name, option in chosen.items():
            key = f"{name}, {steps[name]} steps, {len(data[3])} test images, seed {seed}"
            if key in done:
                continue
            done[key] = list(measure(option, steps[name], seed, data, args.corpus != "digits"))
            results.write_text(json.dumps(done, indent=2))
            print(f"{key}: {done[key][0]:.4f}, {done[key][1]:.1f} s", flush=True)
    found = {
        name: [done[f"{name}, {steps[name]} steps, {len(data[3])} test images, seed {seed}"] for seed in seeds]
        for name in chosen
    }
    print(f"\ntorch {torch.__version__}, {len(seeds)} seeds, {6 * plain * budget * BATCH / 1e12:.1f} TFLOPs a run\n")
    print("| option | MACs an image | steps | top-1 | against plain | CPU seconds |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        gains = [ours[0] - base[0] for ours, base in zip(runs, found.get("plain", runs), strict=True)]
        gain = "" if name == "plain" else spread(gains)
        seconds = statistics.median(run[1] for run in runs)
        share = f"{chosen[name].macs / plain:.2f}"
        print(f"| {name} | {share} | {steps[name]} | {spread([run[0] for run in runs])} | {gain} | {seconds:.0f} |")
    summary = {
        name.replace(" ", "_"): round(statistics.mean(run[0] for run in runs), 4) for name, runs in found.items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
