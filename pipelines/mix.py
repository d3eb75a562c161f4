"""Stage `mix`: several corpora as one, each as often as its weight says and with its labels in one label space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity
from pipelines.config import Strict, how, in_order
from pipelines.identity import StageResult

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus
    from pipelines.corpus.withdrawn import Destination

__all__ = ["STAGE", "VERSION", "MixPart", "MixRecipe", "make_mix", "run"]

STAGE = "mix"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MixPart(Strict):
    """One corpus of a mixture."""

    corpus: str  # CORPUS@VERSION
    weight: float | None = None  # Share of `split` that comes from it; null: each of its images once.
    classes: dict[str, str] | None = None  # Its class -> class of the mixture, others are left out; null: as named.


@dataclass(frozen=True, kw_only=True, slots=True)
class MixRecipe(Strict):
    """Corpora by a name of your choice. Held-out splits have every image once."""

    corpora: dict[str, MixPart] = in_order()  # Classes are numbered in the order in which these first name them.
    destination: str  # Name of the new corpus, or a folder or s3:// prefix for it.
    split: str = "train"  # What weights and balance count for.
    balance: float | None = None  # Repeat classes rarer than this share: sqrt(balance / share) times.
    seed: int = 0
    materialise: Literal["auto", "always", "never"] = "auto"  # New shards; auto: if under 30 % of what is read is used.
    num_workers: int | None = how(default=None)  # New shards made at a time, as in `shard`.

    def __post_init__(self) -> None:
        if len(self.corpora) < 2:
            raise ValueError("corpora: a mixture has two or more; `vit subset` takes a part of one")
        weights = [part.weight for part in self.corpora.values()]
        if any(weight is not None for weight in weights):
            for name, part in self.corpora.items():
                if part.weight is None or not 0 < part.weight < math.inf:
                    raise ValueError(
                        f"corpora.{name}.weight={part.weight}: all have a finite weight above 0, or none has one"
                    )
        if self.balance is not None and not 0 < self.balance <= 1:
            raise ValueError(f"balance={self.balance} is not above 0 and at most 1")


def run(recipe: MixRecipe) -> StageResult:
    """Make the mixture, or return the one that the same recipe and corpora made before."""
    from pipelines.corpus.commit import point_to_finished
    from pipelines.corpus.manifest import open_corpus
    from pipelines.corpus.whole import lost_manifest
    from pipelines.corpus.withdrawn import look_at
    from pipelines.subset import track_making

    corpora = {name: open_corpus(part.corpus) for name, part in recipe.corpora.items()}
    found = look_at(recipe.destination)
    inputs = {f"corpora.{name}": corpus.digest for name, corpus in corpora.items()} | found.inputs
    work = partial(track_making, recipe, lambda check: make_mix(recipe, corpora, found, before_commit=check))
    result = identity.run_stage(STAGE, _version(recipe, corpora), recipe, inputs, work, missing=lost_manifest)
    return point_to_finished(result, found.current)


def _version(recipe: MixRecipe, corpora: Mapping[str, Corpus]) -> int:
    """VERSION, and one more for those recipes alone whose result has changed: all others are found finished."""
    from pipelines.corpus.selection import is_multiplied

    has_weights = any(part.weight is not None for part in recipe.corpora.values())
    again = any(is_multiplied(corpus, recipe.split) for corpus in corpora.values())
    roots = [{one.digest for one in corpus.head.sources} or {corpus.digest} for corpus in corpora.values()]
    share = len(set().union(*roots)) < sum(map(len, roots))  # Images that several parts hold.
    return VERSION + (
        share
        or recipe.materialise != "never"
        or (has_weights and recipe.balance is not None)
        or ((has_weights or recipe.balance is not None) and again)
    )


def make_mix(
    recipe: MixRecipe,
    corpora: Mapping[str, Corpus],
    found: Destination | None = None,
    *,
    before_commit: Callable[[], None] = lambda: None,
) -> Corpus:
    """The work itself, without identity and tracking."""
    import numpy as np

    from pipelines.corpus.commit import Description, make_current, one_writer
    from pipelines.corpus.errors import CorpusError
    from pipelines.corpus.overlap import join_overlaps
    from pipelines.corpus.selection import repeat_factors, single_labels, whole_times
    from pipelines.corpus.views import Part, write_view
    from pipelines.corpus.withdrawn import keep_withdrawn, look_at
    from pipelines.subset import materialise

    if len({corpus.head.multi_label for corpus in corpora.values()}) > 1:
        raise CorpusError("some of the corpora have one label an image, others a list of them; they cannot be mixed")
    found = found or look_at(recipe.destination)
    base = found.base
    class_names, maps = _label_space(recipe, corpora)
    times = {
        name: {split: _labelled(corpus, split, maps[name]) for split in corpus.splits}
        for name, corpus in corpora.items()
    }
    mixed = [name for name, corpus in corpora.items() if recipe.split in corpus.splits]
    factors: dict[str, Any] = {}
    if any(part.weight for part in recipe.corpora.values()):
        for name, corpus in corpora.items():
            if name not in mixed or not times[name][recipe.split].any():
                raise CorpusError(
                    f"corpora.{name} has a weight, and {corpus.reference} gives no image of split {recipe.split!r};"
                    " take it out, or name its classes in `classes`"
                )
        # No image is left out: the corpus that has most images for its weight comes once, the others more often.
        share = {name: (recipe.corpora[name].weight or 0) / times[name][recipe.split].sum() for name in mixed}
        factors = {name: share[name] / min(share.values()) for name in mixed}
    if recipe.balance is not None:
        labels = {name: np.asarray(maps[name])[single_labels(corpora[name], recipe.split)] for name in mixed}
        repeats = repeat_factors(
            np.concatenate([times[name][recipe.split] for name in mixed]),
            np.concatenate([labels[name] for name in mixed]),
            recipe.balance,
        )
        for name, own in zip(mixed, np.split(repeats, np.cumsum([len(labels[n]) for n in mixed])[:-1]), strict=True):
            factors[name] = factors.get(name, 1.0) * own
    for name, factor in factors.items():  # One draw for the product: two with the same numbers would not multiply.
        times[name][recipe.split] = whole_times(times[name][recipe.split], factor, recipe.seed)
    join_overlaps(corpora, maps, times, recipe.split)
    described = Description(
        class_names=class_names,
        multi_label=next(iter(corpora.values())).head.multi_label,
        source=", ".join(corpus.reference for corpus in corpora.values()),
        recipe={name: value for name, value in identity.deciding_fields(recipe).items() if name != "destination"},
    )
    parts = [Part(corpora[name], times[name], maps[name]) for name in corpora]
    with one_writer(base) as check:
        made = keep_withdrawn(materialise(write_view(base, parts, described, None), recipe), found)
        check()
        before_commit()
        make_current(base, made.digest, found.current, made.account)
    return made


def _label_space(
    recipe: MixRecipe, corpora: Mapping[str, Corpus]
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Class names in the order in which the corpora first name them, and the new label of each class of each corpus."""
    from pipelines.corpus.errors import CorpusError

    names: dict[str, int] = {}
    maps: dict[str, tuple[int, ...]] = {}
    for name, corpus in corpora.items():
        given = recipe.corpora[name].classes
        if given is not None and (unknown := sorted(given.keys() - set(corpus.class_names))):
            raise CorpusError(
                f"corpora.{name}.classes names {unknown[0]!r}, which {corpus.reference} has not; it has"
                f" {', '.join(corpus.class_names[:10])}"
            )
        new = [own if given is None else given.get(own) for own in corpus.class_names]
        maps[name] = tuple(-1 if one is None else names.setdefault(one, len(names)) for one in new)
    return tuple(names), maps


def _labelled(corpus: Corpus, split: str, labels: tuple[int, ...]) -> Any:
    """How often each sample comes; those without a label in the mixture do not."""
    import numpy as np

    from pipelines.corpus.rows import tar_rows
    from pipelines.corpus.selection import present, single_labels

    times = present(corpus, split)
    if min(labels) >= 0:
        return times
    new = np.asarray(labels)
    if not corpus.head.multi_label:
        return times * (new[single_labels(corpus, split)] >= 0).astype(np.uint8)
    lists = [one for table in tar_rows(corpus, split, ["labels"]) for one in table["labels"].to_pylist()]
    return times * np.array([any(new[label] >= 0 for label in one) for one in lists], np.uint8)
