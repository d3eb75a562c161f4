"""The main job, measured from outside: `vit demo` in an empty folder, then again, for three seeds.

    python benchmarks/demo.py [--quick] [--seeds 0 1 2] [--output FILE]

Wall seconds from the command to its end with the embedded stack not running, peak PSS over every process of the stack
and the demo, accuracies as the demo itself reports them. `--quick` runs the tiny workflow `workflows/smoke` twice
instead (under 60 s) and so says nothing about accuracy. The last line is one JSON object {claim: number}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

VIT = [sys.executable, "-m", "pipelines"]


class Memory:
    """Peak PSS of all processes whose environment or command line names our state folder, and of their children.

    Ray gives its processes titles that hide their environment, so they are found as children.
    """

    def __init__(self, state: Path) -> None:
        self.state = str(state)
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _ours(self) -> int:
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get("VIT_STATE") == self.state or self.state in " ".join(process.cmdline()):
                    found |= {one.pid: one for one in (process, *process.children(recursive=True))}
            except psutil.Error:
                continue
        total = 0
        for process in found.values():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def _watch(self) -> None:
        while not self._stop.wait(2.0):
            self.peak = max(self.peak, self._ours())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def write_images(folder: Path) -> Path:
    """Handwritten digits 0, 1 and 2 as class folders, for the tiny workflow."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for digit in range(3):
        (folder / f"digit-{digit}").mkdir(parents=True)
        for number, pixels in enumerate(data.images[data.target == digit][:80]):
            Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(
                folder / f"digit-{digit}" / f"{number:04d}.png"
            )
    return folder


def timed(arguments: list[str], environment: dict[str, str]) -> float:
    started = time.monotonic()
    done = subprocess.run([*VIT, *arguments], env=environment)
    if done.returncode:
        raise SystemExit(f"vit {' '.join(arguments)} ended with exit code {done.returncode}")
    return time.monotonic() - started


def once(seed: int, quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="vit-demo-") as folder:
        state = Path(folder) / ".vit"
        environment = {**os.environ, "VIT_STATE": str(state), "PYTHONPATH": str(Path(__file__).parent.parent)}
        for name in ("VIT_ROOT", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
            environment.pop(name, None)
        command = ["demo", "--seed", str(seed)]
        if quick:
            command = ["run", "workflows/smoke", "--shard.source", str(write_images(Path(folder) / "images"))]
        try:
            with Memory(state) as memory:
                first = timed(command, environment)
                again = timed(command, environment)
            result = {"seconds": first, "again_seconds": again, "pss_gb": memory.peak / 1e9}
            if not quick:
                summary = json.loads((state / "demo.json").read_text())
                result.update({key: float(value) for key, value in summary["claims"].items()})
            return result
        finally:
            subprocess.run([*VIT, "down"], env=environment, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="write every run as JSON")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds[:1] if options.quick else options.seeds:
        runs.append({"seed": seed, **once(seed, options.quick)})
        sys.stdout.write(json.dumps(runs[-1]) + "\n")
    if options.output:
        options.output.write_text(json.dumps({"cores": os.cpu_count(), "runs": runs}, indent=1))
    claims = {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0] if key != "seed"}
    prefix = "smoke_" if options.quick else "demo_"
    sys.stdout.write(json.dumps({f"{prefix}{key}": value for key, value in claims.items()}) + "\n")


if __name__ == "__main__":
    main()
