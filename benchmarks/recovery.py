"""How long a lost worker or driver costs, and that no sample is lost or repeated by it.

    python benchmarks/recovery.py [--quick] [--drop-step N]

A pretraining of two workers on the embedded stack: real order, reader, checkpoints, MLflow. A worker gets SIGKILL in
the middle of a checkpoint interval, the driver in the middle of another run, whose command is given again. Seconds are
from the signal to the end of the first step after it. Every rank writes the ids of the samples that it was given; over
the union of committed steps they are compared with whole epochs. `--drop-step` takes one step out of that trace by hand
before it is counted: the script must then report samples as lost. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

from pipelines import identity, pretrain, store  # noqa: E402
from pipelines.config import from_dict, to_yaml  # noqa: E402
from pipelines.training import worker  # noqa: E402
from tests.chaos.nodes import wait_for  # noqa: E402
from tests.chaos.strikes import Strike, struck, struck_at  # noqa: E402
from tests.chaos.trace import Counts, Line, count, read  # noqa: E402

SAMPLES, BATCH, STEPS, INTERVAL = 480, 16, 720, 60


def recipe(corpus: str, seed: int) -> pretrain.PretrainRecipe:
    values: dict[str, Any] = {
        "corpus": corpus,
        "resolution": 16,
        "model": {"patch_size": 4, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2},
        "train": {"batch_size": BATCH, "total_steps": STEPS},
        "optimizer": {"kind": "adamw", "peak_lr": 2e-3},
        "schedule": {"warmup_steps": 5},
        "augment": {"crop": "none"},
        "lanes": 4,
        "validation": {"split": "val", "every_epochs": None},
        "checkpoint": {"every_steps": INTERVAL},
        "seed": seed,
        "workers": {"count": 2, "log_every_steps": 5},
    }
    return from_dict(pretrain.PretrainRecipe, values)


def counted(lines: list[Line], drop: int | None) -> Counts:
    return count([line for line in lines if line.step != drop], SAMPLES, BATCH, STEPS)


def first_step_after(lines: list[Line], moment: float) -> float:
    """When every rank has a whole step behind it that it took after `moment`: asking for the next one says so."""
    start = min(line.start for line in lines if line.time > moment and line.start > last_start(lines, moment))
    steps = sorted({line.step for line in lines if line.start == start})
    return max(line.time for line in lines if line.start == start and line.step == steps[1])


def last_start(lines: list[Line], moment: float) -> tuple[int, int]:
    return max(line.start for line in lines if line.time <= moment)


def kill_worker(corpus: str, seed: int, folder: Path, moments: random.Random) -> tuple[float, list[Line]]:
    step = INTERVAL * moments.randrange(2, 8) + INTERVAL // 2
    strike = Strike("kill", step, moments.randrange(2))
    worker.train_worker = struck(folder, [strike])
    pretrain.run(recipe(corpus, seed))
    lines, moment = read(folder), struck_at(folder, strike)
    return first_step_after(lines, moment) - moment, lines


def kill_driver(corpus: str, seed: int, folder: Path, moments: random.Random) -> tuple[float, list[Line]]:
    given = recipe(corpus, seed)
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(given))
    from pipelines.workflow.planning import plan

    progress = store.join(identity.runs(), "pretrain", plan("pretrain", given).digest, "attempts/1/progress.json")
    command = [sys.executable, "-m", "tests.chaos.driver", str(path), str(folder)]
    wanted = INTERVAL * moments.randrange(3, 8)

    def reached() -> bool:
        try:
            return bool(store.read_json(progress).get("checkpoint", 0) >= wanted)
        except store.NotFound:
            return False

    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(reached)
    finally:
        first.kill()
        first.wait()
    moment = time.time()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=300)
    lines = read(folder)
    # The workers may live a moment longer than their driver: only the next attempt is the recovery.
    after = min(line.time for line in lines if line.start[0] == 2)
    steps = sorted({line.step for line in lines if line.start == (2, 1)})
    assert after > moment
    return max(line.time for line in lines if line.start == (2, 1) and line.step == steps[1]) - moment, lines


def measure(
    folder: Path, moments: random.Random, options: argparse.Namespace
) -> tuple[dict[str, list[float]], list[Counts]]:
    from tests.pipelines.tiny_corpus import write_colours

    seconds: dict[str, list[float]] = {"worker": [], "driver": []}
    found: list[Counts] = []
    corpus = write_colours(str(folder / "colours"), train=SAMPLES).reference
    for number in range(1 if options.quick else 3):
        for seed, (kind, strike) in enumerate((("worker", kill_worker), ("driver", kill_driver)), 2 * number):
            took, lines = strike(corpus, seed, folder / f"{kind}-{number}", moments)
            counts = counted(lines, None)
            seconds[kind].append(took)
            print(
                f"{kind} {number + 1}: {took:.1f} s to the next step, {max(counts.redone.values())} steps redone of an "
                f"interval of {INTERVAL}, samples lost {counts.lost}, repeated {counts.repeated}",
                flush=True,
            )
            if options.drop_step is not None:
                counts = counted(lines, options.drop_step)
                print(f"without step {options.drop_step}: samples lost {counts.lost}, repeated {counts.repeated}")
            found.append(counts)
    return seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill of each kind instead of three")
    parser.add_argument("--drop-step", type=int, help="take this step out of the trace before counting")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vit-recovery-", ignore_cleanup_errors=True) as folder:
        os.environ["VIT_STATE"] = str(Path(folder) / ".vit")
        os.environ["RAY_AUTH_MODE"] = "token"
        from infra import endpoints

        try:
            endpoints.ensure()
            seconds, found = measure(Path(folder), random.Random(options.seed), options)
        finally:
            if "ray" in sys.modules:
                sys.modules["ray"].shutdown()  # A driver that still hangs on when its cluster goes exits at once.
            subprocess.run([sys.executable, "-m", "pipelines", "down"], check=False, stdout=subprocess.DEVNULL)
    print(
        json.dumps(
            {
                "worker_kill_seconds": round(median(seconds["worker"]), 1),
                "driver_kill_seconds": round(median(seconds["driver"]), 1),
                "samples_lost": sum(counts.lost for counts in found),
                "samples_repeated": sum(counts.repeated for counts in found),
                "steps_redone": max(max(counts.redone.values()) for counts in found),
                "checkpoint_interval": INTERVAL,
            }
        )
    )


if __name__ == "__main__":
    main()
