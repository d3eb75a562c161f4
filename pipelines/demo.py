"""`vit demo`: the whole flow on real images, from raw files to a champion, and what came of it in a short table."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import RecipeError
from pipelines.progress import console, say
from pipelines.workflow.report import duration, how_it_came, say_step
from pipelines.workflow.runner import Outcome, again
from pipelines.workflow.spec import load_workflow
from pipelines.workflow.stages import nearest

__all__ = ["Measured", "difference", "main", "sample_values"]

# Below these the demo fails: something is broken. What it reaches stands in docs/performance.md.
FLOORS = {"pretrain": 0.80, "evaluate": 0.90}
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
Values = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Measured:
    """Held-out top-1 with its 95 % interval (Wilson)."""

    top1: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.top1:.3f}  [{self.low:.3f}, {self.high:.3f}]"


def main(
    arguments: Sequence[str],
    *,
    run: Callable[..., dict[str, Outcome]],
    plain: bool = False,
    recompute: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """`[--corpus DIR] [--seed N]`. `run` runs a workflow, `prepare` starts the stack."""
    started = time.monotonic()
    folder, seed = _parse(arguments)
    prepare()
    values, upstream, stand_in = sample_values(folder)
    if seed:
        for step in ("pretrain", "finetune", "scratch"):
            values.setdefault(step, {})["seed"] = seed
    workflow = load_workflow("demo", values)
    say(f"upstream    {upstream}")
    say(f"downstream  {_downstream(folder)}")
    done: dict[str, Outcome] = {}

    def observe(outcome: Outcome) -> None:
        done[outcome.step] = outcome
        say_step(outcome)

    try:
        with again(recompute):
            outcomes = run(workflow, plain=plain, observe=observe)
    except Exception:
        # A refused promotion ends here, since nothing is left to predict with: what was reached is shown all the same.
        if done:
            _say_table(done)
            for name in ("pretrain", "evaluate", "evaluate_scratch"):
                if name in done:
                    say(f"  {name + ', held-out top-1':<34}{_measured(done[name])}")
        raise
    return _summary(outcomes, folder, stand_in, time.monotonic() - started)


def _parse(arguments: Sequence[str]) -> tuple[Path | None, int]:
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given: dict[str, str] = {}
    while words:
        flag = words.pop(0)
        if flag not in {"--corpus", "--seed"}:
            known = ["--corpus", "--seed", "--plain", "--again"]
            raise RecipeError(f"vit demo takes no {flag!r}{nearest(flag, known)}")
        if not words or flag in given:
            raise RecipeError(f"vit demo {flag} takes one value, once")
        given[flag] = words.pop(0)
    if not given.get("--seed", "0").isdecimal():
        raise RecipeError(f"--seed {given['--seed']}: a seed is a whole number from 0")
    return _folder(given.get("--corpus")), int(given.get("--seed", "0"))


def _folder(name: str | None) -> Path | None:
    if name is None:
        return None
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise RecipeError(f"--corpus {name}: no such folder; give one whose sub-folders are the classes")
    count = len(_classes(folder))
    if count < 2:
        raise RecipeError(
            f"--corpus {folder}: {count} sub-folders with images; a classifier needs two classes or more, "
            "as FOLDER/CLASS/FILE or FOLDER/{train,test}/CLASS/FILE"
        )
    return folder


def _classes(folder: Path) -> list[str]:
    inner = folder / "train" if (folder / "train").is_dir() else folder
    return [child.name for child in inner.iterdir() if child.is_dir() and _has_image(child)]


def _missing_splits(folder: Path) -> dict[str, float] | None:
    """Fractions of the training images for the splits that the folder does not have itself."""
    given = {name for name in ("train", "val", "test") if (folder / name).is_dir()}
    if "train" not in given:
        given = set()
    missing = {name: part for name, part in (("val", 0.08), ("test", 0.22)) if name not in given}
    return {"train": 1 - sum(missing.values()), **missing} if missing else None


def _has_image(folder: Path) -> bool:
    return any(file.suffix.lower() in IMAGE_ENDINGS for file in folder.rglob("*"))


def sample_values(folder: Path | None) -> tuple[Values, str, bool]:
    """Where the images lie, as values for the steps; a sentence on the upstream ones; whether they are a stand-in."""
    from pipelines.corpus.samples import digits, fashion_mnist
    from pipelines.workflow.home import state_folder

    samples = state_folder() / "samples"
    samples.mkdir(exist_ok=True)
    fashion, told = fashion_mnist(samples)
    downstream = folder or digits(samples)
    values: Values = {
        "shard_fashion": {"source": str(fashion)},
        "shard_digits": {"source": str(downstream)},
        "predict": {"images": str(downstream)},
    }
    if folder is not None:
        name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-") or "own"
        values["shard_digits"] |= {"destination": name, "splits": _missing_splits(folder)}
        values["finetune"] = {"register_as": name}
        values["scratch"] = {"register_as": f"{name}-scratch"}
        # How hard the task is nobody knows: the first champion need only beat guessing.
        values["promote"] = {"minimum": 1 / len(_classes(folder))}
    return values, told, fashion.name != "fashion-mnist"


def _downstream(folder: Path | None) -> str:
    return f"{folder} (your class folders)" if folder else "1,797 handwritten digits from scikit-learn"


def _say_table(outcomes: Mapping[str, Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("step", "", "images/s", "seconds", "output"):
        table.add_column(column, justify="right" if column in {"images/s", "seconds"} else "left", overflow="fold")
    for name, outcome in outcomes.items():
        rate = _images_per_second(outcome)
        table.add_row(
            name, how_it_came(outcome), f"{rate:,.0f}" if rate else "", f"{outcome.seconds:.1f}", _short(outcome)
        )
    say("")
    terminal = console()
    (terminal if terminal.is_terminal else Console(file=terminal.file, width=140)).print(table)


def _summary(outcomes: Mapping[str, Outcome], folder: Path | None, stand_in: bool, seconds: float) -> int:
    _say_table(outcomes)
    pretrained, tuned, twin = (_measured(outcomes[name]) for name in ("pretrain", "evaluate", "evaluate_scratch"))
    gain, low, high = difference(tuned, twin)
    upstream = "stand-in photos" if stand_in else "Fashion-MNIST"
    downstream = folder.name if folder else "digits"
    say("\nheld-out top-1, with its 95 % interval")
    say(f"  {upstream + ', pretrained':<34}{pretrained}")
    say(f"  {downstream + ', fine-tuned from it':<34}{tuned}")
    say(f"  {downstream + ', the same from scratch':<34}{twin}")
    say(f"  {'what pretraining gave':<34}{gain:+.3f}  [{low:+.3f}, {high:+.3f}]")
    reused = sum(outcome.result.reused for outcome in outcomes.values())
    say(
        f"\nwall time {duration(seconds)}; {len(outcomes) - reused} steps ran, {reused} were finished before and reused"
    )
    _keep(outcomes, seconds, pretrained, tuned, twin)
    model = _model_name(outcomes["finetune"])
    say(f"MLflow    {os.environ.get('MLFLOW_TRACKING_URI', 'MLFLOW_TRACKING_URI is not set')}  (model {model})")
    say("next")
    say("  vit why demo                            what is finished, and what would run after a change")
    say("  vit demo --corpus DIR                   the same with your own class folders")
    say(f"  vit predict demo/predict --model models:/{model}@champion --images DIR")

    floors = {} if folder else {"evaluate": FLOORS["evaluate"]}
    if not stand_in:
        floors["pretrain"] = FLOORS["pretrain"]
    failed = [
        f"{name}: held-out top-1 {_measured(outcomes[name]).top1:.3f} is below {floor:.2f}"
        for name, floor in floors.items()
        if _measured(outcomes[name]).top1 < floor
    ]
    for line in failed:
        say(f"FAILED  {line}")
    return 1 if failed else 0


def _keep(
    outcomes: Mapping[str, Outcome], seconds: float, pretrained: Measured, tuned: Measured, twin: Measured
) -> None:
    """The same figures for programs: demo.json in the state folder; benchmarks/demo.py reads it."""
    from pipelines.workflow.home import state_folder

    claims = {
        "upstream_top1": pretrained.top1,
        "downstream_top1": tuned.top1,
        "gain_over_scratch": tuned.top1 - twin.top1,
        "pretrain_images_per_second": _images_per_second(outcomes["pretrain"]) or 0.0,
    }
    steps = {
        name: {"digest": outcome.result.digest, "reused": outcome.result.reused, "seconds": round(outcome.seconds, 2)}
        for name, outcome in outcomes.items()
    }
    text = json.dumps({"seconds": round(seconds, 2), "claims": claims, "steps": steps}, indent=1)
    (state_folder() / "demo.json").write_text(text)


def difference(one: Measured, other: Measured) -> tuple[float, float, float]:
    """one - other with its 95 % interval from the two intervals (Newcombe 1998, method 10)."""
    gain = one.top1 - other.top1
    low = gain - math.hypot(one.top1 - one.low, other.high - other.top1)
    high = gain + math.hypot(one.high - one.top1, other.top1 - other.low)
    return gain, low, high


def _measured(outcome: Outcome) -> Measured:
    metrics = outcome.result.metrics
    top1 = metrics["test/top1"]
    return Measured(top1, metrics["test/top1_low"], metrics["test/top1_high"])


def _images_per_second(outcome: Outcome) -> float | None:
    """As the stage measured it, else over the whole step; a reused step keeps only the former."""
    result = outcome.result
    measured = result.metrics.get("images_per_second")
    images = result.metrics.get("test/num_images") or result.details.get("num_images")
    if measured is None and images and not result.reused:
        return float(images) / outcome.seconds
    return measured


def _short(outcome: Outcome) -> str:
    return re.sub(r"[0-9a-f]{64}", lambda found: found[0][:12], outcome.result.uri)


def _model_name(outcome: Outcome) -> str:
    found = re.fullmatch(r"models:/([^/@]+)[/@].*", outcome.result.uri)
    return found[1] if found else "(not registered)"
