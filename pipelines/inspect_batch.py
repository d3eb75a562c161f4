"""`vit inspect-batch RECIPE`: a picture of what the model will see, with labels and weights, after all augmentation."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import RecipeError, find_recipe, load_recipe, parse
from pipelines.progress import say
from pipelines.workflow.stages import recipe_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipelines.batch import Batch
    from pipelines.corpus.manifest import Corpus

__all__ = ["batch_figure", "main", "training_batch"]

STAGES = ("pretrain", "finetune")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
COLUMNS = 8
MOST_SHARES = 2  # Classes named under one image.


def main(arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> int:
    """`[STAGE] RECIPE [--step N] [--images N] [--output FILE] [--dotted.flag VALUE ...]`; needs no Ray cluster."""
    words = list(arguments)
    if not words or words[0].startswith("-"):
        raise RecipeError("vit inspect-batch needs a recipe of pretrain or finetune; `vit recipes` lists them")
    stage = words.pop(0) if len(words) > 1 and words[0] in STAGES and not words[1].startswith("-") else None
    own, flags = _own_flags(words[1:])
    stage = stage or _stage_of(words[0])
    recipe = parse(recipe_class(stage), [words[0], *flags], prog=f"vit inspect-batch {stage}")
    prepare()
    from pipelines.corpus.manifest import open_corpus
    from pipelines.tracking.figures import boxes_for_unknown_letters

    corpus = open_corpus(recipe.corpus)
    batch = training_batch(recipe, corpus, own.step)
    figure = batch_figure(batch, corpus.class_names, own.images, f"{words[0]}, step {own.step:,}")
    own.output.parent.mkdir(parents=True, exist_ok=True)
    with boxes_for_unknown_letters():
        figure.savefig(own.output, dpi=100)
    bad = int((batch.weights == 0).sum())
    shown = min(own.images, len(batch))
    say(f"{own.output}: {shown} of the {len(batch)} images of step {own.step:,}" + (f"; {bad} bad" if bad else ""))
    return 0


def _own_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="vit inspect-batch RECIPE", add_help=False, allow_abbrev=False)
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("batch.png"))
    own, rest = parser.parse_known_args(words)
    if own.step < 0 or own.images < 1:
        raise RecipeError(f"--step {own.step}, --images {own.images}: a step from 0 on and at least one image")
    if own.output.suffix.lower() not in PICTURES or own.output.is_dir():
        raise RecipeError(f"--output {own.output}: a file whose name ends in one of {', '.join(PICTURES)}")
    return own, rest


def _stage_of(name: str) -> str:
    """The training stage whose recipe dataclass takes this file."""
    path = str(find_recipe(name))
    refusals: list[str] = []
    fits: list[str] = []
    for stage in STAGES:
        try:
            load_recipe(recipe_class(stage), path)
            fits.append(stage)
        except RecipeError as error:
            refusals.append(f"{stage}: {error}")
    named = [stage for stage in fits if stage in name] or fits
    if len(named) == 1:
        return named[0]
    if fits:
        raise RecipeError(f"{name} fits {' and '.join(fits)}; say which: vit inspect-batch {fits[0]} {name}")
    raise RecipeError(f"{name} is no recipe that trains:\n" + "\n".join(refusals))


def training_batch(recipe: Any, corpus: Corpus, step: int) -> Batch:
    """All images of a step as the recipe would train on them, on whatever device it would; uint8.

    Read on threads of this process: order and pixels are the same. Lanes are those of up to two workers, or
    workers.count: more workers than that may have the reader choose more lanes.
    """
    from dataclasses import replace

    from pipelines.fit import check_splits
    from pipelines.reader.loader import DeviceBatches, changes_of, choose_lanes, train_batches
    from pipelines.training.parallel import pick_device
    from vit_model import InputSpec

    check_splits(recipe, corpus)
    channels = recipe.model.channels if recipe.model is not None and recipe.model.channels is not None else 3
    spec = InputSpec(
        channels=channels,
        height=recipe.resolution,
        width=recipe.resolution,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    size = recipe.train.batch_size
    lanes = choose_lanes(corpus.pages(recipe.split), size, max(2, recipe.workers.most or 0), recipe.lanes)
    stream = train_batches(
        corpus,
        split=recipe.split,
        batch_size=size,
        seed=recipe.seed,
        spec=spec,
        augment=recipe.augment,
        start_step=step,
        total_steps=step + 1,
        lanes=lanes,
        reader=replace(recipe.reader, backend="local", decode="auto"),
    )
    device = pick_device()
    changes = changes_of(recipe.augment)
    with DeviceBatches(
        stream, device, changes=changes, seed=recipe.seed, num_classes=len(corpus.class_names)
    ) as batches:
        return next(batches)


def batch_figure(batch: Batch, class_names: Sequence[str], limit: int, title: str = "") -> Figure:
    """Images in the order of the batch; a mixed one names its classes by their shares, one of weight 0 is crossed.

    Of several labels an image two are named, the others counted.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    from pipelines.tracking.figures import plain

    count = min(limit, len(batch))
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = NewFigure(figsize=(1.9 * columns, 2.3 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(plain(title, 80), parse_math=False)
    images, labels, weights = (tensor.cpu().numpy() for tensor in (batch.images, batch.labels, batch.weights))
    for place in range(count):
        axes = figure.add_subplot(rows, columns, place + 1)
        image = images[place]
        if len(image) >= 3:
            axes.imshow(image[:3].transpose(1, 2, 0), interpolation="nearest")
        else:
            axes.imshow(image[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.axis("off")
        if weights[place]:
            text = "\n".join(plain(line) for line in _label_lines(labels[place], class_names))
        else:
            text = "bad sample,\nweight 0"
            axes.plot([0, 1], [0, 1], color="firebrick", transform=axes.transAxes)
        text += f"\n#{int(batch.sample_ids[place])}"
        axes.set_title(text, fontsize="x-small", color="black" if weights[place] else "firebrick", parse_math=False)
    return figure


def _label_lines(label: Any, class_names: Sequence[str]) -> list[str]:
    if not label.shape:
        return [class_names[int(label)]]
    best = [int(k) for k in label.argsort()[::-1] if label[k] > 0]
    lines = [f"{label[k]:.0%} {class_names[k]}" for k in best[:MOST_SHARES]]
    return lines if len(best) <= MOST_SHARES else [*lines, f"and {len(best) - MOST_SHARES} more"]
