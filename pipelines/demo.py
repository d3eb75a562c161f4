"""`vit demo`: the whole flow on real images, from raw files to a champion, and what came of it in a short table."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import RecipeError
from pipelines.demo_summary import Summary, keep, say_reached, say_summary
from pipelines.progress import say
from pipelines.workflow.report import say_step
from pipelines.workflow.runner import NotRun, Outcome, StepFailed, again
from pipelines.workflow.spec import load_workflow
from pipelines.workflow.stages import nearest

__all__ = ["main", "sample_values"]

# 0.895 was measured on digits after the stand-in, 0.749 from scratch: it teaches less than Fashion-MNIST.
STAND_IN_MINIMUM = 0.75
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
Values = dict[str, dict[str, Any]]


def main(
    arguments: Sequence[str],
    *,
    run: Callable[..., dict[str, Outcome]],
    plain: bool = False,
    recompute: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """`[--corpus DIR] [--seed N]`. `run` runs a workflow, `prepare` starts the stack.

    0: done; 1: an accuracy is below its floor; 3: the gate refused the version, and there is no champion.
    """
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
    not_run: dict[str, str] = {}

    def observe(outcome: Outcome) -> None:
        done[outcome.step] = outcome
        say_step(outcome)

    def summary() -> Summary:
        return Summary(
            outcomes=done,
            not_run=not_run,
            upstream="stand-in photos" if stand_in else "Fashion-MNIST",
            downstream=folder.name if folder else "digits",
            own_images=folder is not None,
            stand_in=stand_in,
            seconds=time.monotonic() - started,
        )

    try:
        with again(recompute):
            run(workflow, plain=plain, observe=observe)
    except Exception as error:
        refused = error.__cause__
        if not (isinstance(error, StepFailed) and isinstance(refused, NotRun)):
            if done:
                say_reached(summary())
            raise
        not_run[error.step] = str(refused)  # The gate refused: that is an answer, not an accident.
    end = summary()
    keep(end)
    say_summary(end)
    return end.exit_code


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
    from pipelines.workflow.home import locked, state_folder

    samples = state_folder() / "samples"
    samples.mkdir(exist_ok=True)
    with locked(samples):  # Two shells may want them at once.
        fashion, told = fashion_mnist(samples)
        downstream = folder or digits(samples)
    is_stand_in = fashion.name != "fashion-mnist"
    values: Values = {
        "shard_fashion": {"source": str(fashion)},
        "shard_digits": {"source": str(downstream)},
        "predict": {"images": str(downstream)},
    }
    if is_stand_in:
        values["promote"] = {"minimum": STAND_IN_MINIMUM}
    if folder is not None:
        name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
        if not name:  # In another script: two such folders are still two models.
            name = f"own-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:8]}"
        values["shard_digits"] |= {"destination": name, "splits": _missing_splits(folder)}
        values["finetune"] = {"register_as": name}
        values["scratch"] = {"register_as": f"{name}-scratch"}
        # How hard the task is nobody knows: the first champion need only beat guessing.
        values["promote"] = {"minimum": 1 / len(_classes(folder))}
    return values, told, is_stand_in


def _downstream(folder: Path | None) -> str:
    return f"{folder} (your class folders)" if folder else "1,797 handwritten digits from scikit-learn"
