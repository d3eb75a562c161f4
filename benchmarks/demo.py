"""The main job, measured from outside: `vit demo` in an empty state folder, then again, for three seeds.

    python benchmarks/demo.py [--quick] [--seeds 0 1 2] [--no-install] [--output FILE]

Each seed starts from nothing: an empty folder of its own, the embedded stack not running. Reported are wall seconds
from the command to its end, the same for the second run, peak PSS over every process of the stack and the demo,
accuracies as the demo itself reports them, and apart from them the seconds of `make setup` in a copy of the sources
(with pip's cache as it is). `--quick` runs two tiny stages instead (under 60 s) and so says nothing about accuracy or
the demo's time. The last line is one JSON object {claim: number}: medians over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VIT = [sys.executable, "-m", "pipelines"]
MEMORY_SECONDS = 3.0  # Between two looks at the memory; one costs some milliseconds a process.
QUICK_WORKFLOW = """\
name: quick
steps:
  shard: {stage: shard, recipe: smoke/shard, set: {num_workers: 0}}
  pretrain: {stage: pretrain, recipe: smoke/pretrain, inputs: {corpus: shard}}
"""
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".vit", "__pycache__", ".*_cache", "*.egg-info", "bench-results")


class Memory:
    """Peak PSS of all processes whose environment names our state folder, and of all that descend from them.

    PSS counts a page that several share once over all. Ray gives its workers titles that hide their environment: they
    are found as descendants. Linux only.
    """

    def __init__(self, state: Path) -> None:
        self._mark = f"VIT_STATE={state}".encode()
        self.peak = 0
        self.processes = 0  # At the peak.
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _ours(self) -> set[int]:
        parents: dict[int, int] = {}
        ours: set[int] = set()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    ours.add(int(folder.name))
            except (OSError, IndexError):  # Gone meanwhile, or somebody else's.
                continue
        while grown := {pid for pid, parent in parents.items() if parent in ours and pid not in ours}:
            ours |= grown
        return ours

    def _watch(self) -> None:
        while not self._stop.wait(MEMORY_SECONDS):
            ours = self._ours()
            if (total := sum(map(pss, ours))) > self.peak:
                self.peak, self.processes = total, len(ours)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def pss(pid: int) -> int:
    """Bytes; 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def write_images(folder: Path) -> Path:
    """Handwritten digits 0, 1 and 2 as class folders, for the tiny workflow."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for digit in range(3):
        place = folder / f"digit-{digit}"
        place.mkdir(parents=True)
        for number, pixels in enumerate(data.images[data.target == digit][:80]):
            Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(place / f"{number:04d}.png")
    return folder


def timed(arguments: list[str], environment: dict[str, str], folder: Path) -> float:
    started = time.monotonic()
    done = subprocess.run([*VIT, *arguments], env=environment, cwd=folder)
    if done.returncode:
        raise SystemExit(f"vit {' '.join(arguments)} ended with exit code {done.returncode}")
    return time.monotonic() - started


@contextmanager
def empty_place() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder and an environment in which no stack runs and nothing was ever made; the stack is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="vit-bench-") as name:
        folder = Path(name)
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("VIT_", "RAY_", "MLFLOW_", "AWS_", "DAGSTER_"))
        }
        environment |= {"VIT_STATE": str(folder / ".vit"), "PYTHONPATH": str(ROOT)}
        try:
            yield folder, environment
        finally:
            subprocess.run([*VIT, "down"], env=environment, cwd=folder, check=False)


def once(seed: int, quick: bool) -> dict[str, float]:
    with empty_place() as (folder, environment):
        state = folder / ".vit"
        command = ["demo", "--seed", str(seed)]
        if quick:
            (folder / "quick.yaml").write_text(QUICK_WORKFLOW)
            command = ["run", "quick.yaml", "--shard.source", str(write_images(folder / "images"))]
        with Memory(state) as memory:
            first = timed(command, environment, folder)
            again = timed(command, environment, folder)
        result = {"seconds": first, "again_seconds": again, "peak_pss_gb": memory.peak / 1e9}
        if not quick:
            kept = json.loads((state / "demo.json").read_text())
            if kept["stand_in"]:
                raise SystemExit("Fashion-MNIST could not be had: the figures would be those of its stand-in")
            if not all(step["reused"] for step in kept["steps"].values()):
                raise SystemExit(f"the second run did not reuse every step: {kept['steps']}")
            result |= {key: float(value) for key, value in kept["claims"].items()}
        return result


def install_seconds() -> float:
    """`make setup` as a new user runs it, in a copy of the sources; pip's cache stays as it is."""
    with tempfile.TemporaryDirectory(prefix="vit-install-") as name:
        copy = Path(name) / "vit"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        started = time.monotonic()
        subprocess.run(["make", "setup", f"PYTHON={Path(sys.executable).resolve()}"], cwd=copy, check=True)
        return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tiny stages, twice; under 60 s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-install", action="store_true", help="leave the installation out")
    parser.add_argument("--output", type=Path, help="write every run as JSON")
    options = parser.parse_args()
    prefix = "quick_" if options.quick else "demo_"
    runs: list[dict[str, float]] = []
    for seed in options.seeds[:1] if options.quick else options.seeds:
        runs.append({"seed": seed, **once(seed, options.quick)})
        sys.stdout.write(json.dumps(runs[-1]) + "\n")
        sys.stdout.flush()
    names = [key for key in runs[0] if key != "seed"]
    claims = {f"{prefix}{key}": round(statistics.median(run[key] for run in runs), 4) for key in names}
    if not (options.quick or options.no_install):
        claims["install_seconds"] = round(install_seconds(), 1)
    if options.output:
        options.output.write_text(json.dumps({"cores": os.cpu_count(), "runs": runs, "claims": claims}, indent=1))
    sys.stdout.write(json.dumps(claims) + "\n")


if __name__ == "__main__":
    main()
