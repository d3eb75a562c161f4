"""Every `smoke/` twin of a training recipe, trained for real: does each end within two minutes on this machine?

    python benchmarks/twins.py [--quick] [--only NAME ...] [--seconds 120]

A corpus of tiny digits (scikit-learn's), the embedded stack in a state folder of its own, one twin after the other as
`vit pretrain smoke/NAME`, then `smoke/finetune` from the weights of smoke/masked. `--quick` runs two of them. Exit code
1 if one fails or takes longer. The last line is one JSON object: `slowest_seconds`, `failed`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines.config import packaged_recipes
from pipelines.why import stage_of

ROOT = Path(__file__).resolve().parent.parent
VIT = [sys.executable, "-m", "pipelines"]
QUICK = ("vit_jft", "masked")


def write_digits(folder: Path, count: int = 300) -> Path:
    """Class folders of PNGs of 16 x 16 px."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in range(count):
        place = folder / f"digit-{digits.target[number]}"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((digits.images[number] * 15.9).astype("uint8")).convert("RGB").resize((16, 16))
        picture.save(place / f"{number}.png")
    return folder


def vit(state: Path, *words: str) -> tuple[int, float, str]:
    """Exit code, seconds and output of one command."""
    started = time.perf_counter()
    environment = {**os.environ, "VIT_STATE": str(state)}
    done = subprocess.run([*VIT, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, time.perf_counter() - started, done.stdout + done.stderr


def weights_of(output: str) -> str | None:
    """The URI that a training prints last."""
    words = [word.strip(",;()") for word in output.split()]
    return next((word for word in reversed(words) if word.endswith("weights.safetensors")), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two of them")
    parser.add_argument("--only", nargs="+", help="names without smoke/")
    parser.add_argument("--seconds", type=float, default=120.0, help="allowed to each")
    args = parser.parse_args()
    smoke = [name.removeprefix("smoke/") for name in packaged_recipes() if name.startswith("smoke/")]
    names = args.only or [name for name in smoke if stage_of(f"smoke/{name}") == "pretrain"]
    if args.quick:
        names = list(QUICK)
    seconds: dict[str, float] = {}
    failed: list[str] = []
    masked: str | None = None
    with tempfile.TemporaryDirectory(prefix="vit-twins-") as folder:
        state, images = Path(folder) / "state", write_digits(Path(folder) / "images")
        try:
            code, _, output = vit(state, "shard", "smoke/shard", "--source", str(images))
            if code:
                raise SystemExit(output)
            for name in [*names, *(["finetune"] if "masked" in names else [])]:
                flags = [] if name != "finetune" else ["finetune", "smoke/finetune", "--weights", str(masked)]
                code, took, output = vit(state, *(flags or ["pretrain", f"smoke/{name}"]))
                masked = weights_of(output) if name == "masked" else masked
                seconds[name] = round(took, 1)
                verdict = "failed" if code else "too slow" if took > args.seconds else "trained"
                if verdict != "trained":
                    failed.append(name)
                print(f"{name:20} {took:6.1f} s  {verdict}", flush=True)
                if code:
                    print(output[-3000:], flush=True)
        finally:
            vit(state, "down")
    print(json.dumps({"slowest_seconds": max(seconds.values()), "failed": len(failed), "seconds": seconds}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
