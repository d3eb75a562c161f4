"""Stage `subset`: a part of a corpus as a corpus of its own, over the same shards or with new ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity
from pipelines.config import Strict, how, input_
from pipelines.identity import Attempt, StageResult
from pipelines.progress import say

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus
    from pipelines.corpus.withdrawn import Destination
    from pipelines.mix import MixRecipe

__all__ = ["STAGE", "VERSION", "SubsetRecipe", "make_subset", "materialise", "run", "track_making"]

STAGE = "subset"
VERSION = 1
LEAST_USEFUL = 0.3  # Below this part of what is read a corpus gets shards of its own.


@dataclass(frozen=True, kw_only=True, slots=True)
class SubsetRecipe(Strict):
    """A part of one split; the other splits stay whole."""

    corpus: str = input_()  # CORPUS@VERSION
    destination: str  # Name of the new corpus, or a folder or s3:// prefix for it.
    split: str = "train"
    # Of the images, by chance, each as often as it comes; smaller ones lie in larger ones of the same seed.
    fraction: float | None = None
    per_class: int | None = None  # The first so many of each class, in manifest order, each once.
    balance: float | None = None  # Repeat classes rarer than this share: sqrt(balance / share) times.
    seed: int = 0
    materialise: Literal["auto", "always", "never"] = "auto"  # New shards; auto: if under 30 % of what is read is used.
    num_workers: int | None = how(default=None)  # New shards made at a time, as in `shard`.

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} is not above 0 and at most 1")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"per_class={self.per_class} is below 1")
        if self.balance is not None and not 0 < self.balance <= 1:
            raise ValueError(f"balance={self.balance} is not above 0 and at most 1; 0.001 is usual for 1,000 classes")
        if self.fraction is not None and self.per_class is not None:
            raise ValueError("fraction and per_class are two ways to choose; keep one")
        if self.fraction is None and self.per_class is None and self.balance is None:
            raise ValueError("nothing is chosen: give fraction, per_class or balance")


def run(recipe: SubsetRecipe) -> StageResult:
    """Make the subset, or return the one that the same recipe and corpus made before."""
    from pipelines.corpus.commit import point_to_finished
    from pipelines.corpus.manifest import open_corpus
    from pipelines.corpus.selection import is_multiplied
    from pipelines.corpus.whole import lost_manifest
    from pipelines.corpus.withdrawn import look_at

    corpus = open_corpus(recipe.corpus)
    found = look_at(recipe.destination)
    work = partial(track_making, recipe, lambda check: make_subset(recipe, corpus, found, before_commit=check))
    inputs = {"corpus": corpus.digest, **found.inputs}
    # Those whose result has changed since VERSION was raised: all others are found finished.
    again = recipe.balance is not None and is_multiplied(corpus, recipe.split)
    version = VERSION + (again or recipe.per_class is not None or len(corpus.head.sources) > 1)
    result = identity.run_stage(STAGE, version, recipe, inputs, work, missing=lost_manifest)
    return point_to_finished(result, found.current)


def make_subset(
    recipe: SubsetRecipe,
    corpus: Corpus,
    found: Destination | None = None,
    *,
    before_commit: Callable[[], None] = lambda: None,
) -> Corpus:
    """The work itself, without identity and tracking."""
    from pipelines.corpus.commit import Description, make_current, one_writer
    from pipelines.corpus.selection import (
        first_per_class,
        present,
        random_fraction,
        repeat_factors,
        single_labels,
        whole_times,
    )
    from pipelines.corpus.views import Part, write_view
    from pipelines.corpus.withdrawn import keep_withdrawn, look_at

    corpus.pages(recipe.split)  # Says which splits there are.
    found = found or look_at(recipe.destination)
    base = found.base
    times = present(corpus, recipe.split)
    if recipe.fraction is not None:
        times = random_fraction(times, recipe.fraction, recipe.seed)
    if recipe.per_class is not None:
        times = (times > 0).astype(times.dtype)  # So many of each class, however often they come in the corpus.
        times = first_per_class(times, single_labels(corpus, recipe.split), recipe.per_class)
    if recipe.balance is not None:
        factors = repeat_factors(times, single_labels(corpus, recipe.split), recipe.balance)
        times = whole_times(times, factors, recipe.seed)
    described = Description(
        class_names=corpus.class_names,
        multi_label=corpus.head.multi_label,
        source=corpus.reference,
        recipe={name: value for name, value in identity.deciding_fields(recipe).items() if name != "destination"},
    )
    parts = [Part(corpus, {split: times if split == recipe.split else None for split in corpus.splits})]
    with one_writer(base) as check:
        made = keep_withdrawn(materialise(write_view(base, parts, described, None), recipe), found)
        check()
        before_commit()
        make_current(base, made.digest, found.current, made.account)
    return made


def materialise(corpus: Corpus, recipe: SubsetRecipe | MixRecipe) -> Corpus:
    """The same samples in shards of their own, if most of what is read would be thrown away. Not made current."""
    part = corpus.pages(recipe.split).useful_part()
    if recipe.materialise == "never" or (recipe.materialise == "auto" and part >= LEAST_USEFUL):
        return corpus
    from pipelines.shard import ShardRecipe, write_shards

    say(f"{corpus.uri}: {part:.0%} of what is read would be used; its images are written into shards of their own")
    return write_shards(
        ShardRecipe(
            source=corpus.reference,
            destination=corpus.uri,
            seed=recipe.seed,
            validate="header",
            num_workers=recipe.num_workers,
        ),
        view=corpus,
    )


def track_making(recipe: Any, make: Callable[[Callable[[], None]], Corpus], attempt: Attempt) -> StageResult:
    """Run and record the making of a corpus from other corpora."""
    from pipelines.tracking.run import track

    with track(attempt, recipe) as run:
        corpus = make(attempt.check)
        head = corpus.head
        metrics = {"images": float(head.samples), "shards": float(head.shards), "bytes": float(head.bytes)}
        metrics |= {f"{split}_images": float(count) for split, count in head.splits.items()}
        run.set_tags({"vit.corpus": corpus.reference})
        run.log_metrics(metrics, step=0)
        return attempt.result(
            uri=corpus.reference,
            run_id=run.id,
            metrics=metrics,
            corpus=corpus.reference,
            splits=head.splits,
            class_names=list(head.class_names),
            **({"account": corpus.account} if corpus.account else {}),
        )
