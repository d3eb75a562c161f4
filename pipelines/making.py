"""A corpus out of a source: plan first, then every shard, and the manifest last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import identity
from pipelines.progress import progress, say

if TYPE_CHECKING:
    from pipelines.corpus.commit import ShardRecord
    from pipelines.corpus.entries import Entries
    from pipelines.corpus.manifest import Corpus, Head
    from pipelines.corpus.plan import Listing, Plan
    from pipelines.corpus.sources import Source
    from pipelines.shard import ShardRecipe

__all__ = ["make_corpus", "write_shards"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Planned:
    """What a run is about to write."""

    current: str | None  # State of current.json when it began.
    parent: Corpus | None  # What is appended to.
    plan: Plan | None  # None: the parent has everything.
    listing: Listing | None

    def take_listing(self) -> Listing:
        """Once: it is large, and nobody needs it when it is written."""
        listing, self.listing = self.listing, None
        assert listing is not None
        return listing


def _plan_source(recipe: ShardRecipe, source: Source) -> _Planned:
    """Everything that is decided before anything is written. Raises CorpusError, SourceError."""
    from pipelines.corpus.commit import current_etag
    from pipelines.corpus.manifest import corpus_base, open_corpus
    from pipelines.corpus.tiled import check_tiling

    if recipe.jpeg == "tiled":
        check_tiling()
    base = corpus_base(recipe.destination)
    current = current_etag(base)
    parent = open_corpus(f"{base}@current") if recipe.append else None
    plan, listing = _plan(recipe, source, base, parent) or (None, None)
    return _Planned(current, parent, plan, listing)


def make_corpus(
    recipe: ShardRecipe,
    source: Source | None = None,
    *,
    keep: bool = True,
    before_build: Callable[[Plan], None] = lambda plan: None,
    meanwhile: Callable[[], None] = lambda: None,
    before_commit: Callable[[], None] = lambda: None,
) -> Corpus:
    """The work itself, without identity and tracking. `keep` takes over shards that an earlier attempt finished.

    `meanwhile` is called with each shard that is done; what it raises ends the work.
    """
    from pipelines.corpus.commit import make_current, one_writer
    from pipelines.corpus.grow import join_versions
    from pipelines.corpus.manifest import corpus_base
    from pipelines.corpus.sources import open_source

    base = corpus_base(recipe.destination)
    found = _plan_source(recipe, source or open_source(recipe.source))
    parent = found.parent
    if found.plan is None:
        assert parent is not None
        say(f"shard: {recipe.source} has no usable image that {parent.reference} has not")
        return parent
    with one_writer(base) as check:
        corpus = write_shards(
            recipe, found.plan, found.take_listing(), keep=keep, before_build=before_build, meanwhile=meanwhile
        )
        if parent is not None:
            corpus = join_versions(parent, corpus)
        check()
        before_commit()
        make_current(base, corpus.digest, found.current)
    return corpus


def write_shards(
    recipe: ShardRecipe,
    plan: Plan | None = None,
    listing: Listing | None = None,
    *,
    keep: bool = True,
    before_build: Callable[[Plan], None] = lambda plan: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Corpus:
    """The shards of a plan and their manifest, not made current; without one that of the recipe."""
    from pipelines.corpus.commit import Records, commit
    from pipelines.corpus.manifest import corpus_base
    from pipelines.corpus.parts import RowCache
    from pipelines.corpus.plan import freeze
    from pipelines.corpus.quarantine import check_fraction
    from pipelines.corpus.sources import open_source

    base = corpus_base(recipe.destination)
    if plan is None:
        planned = _plan(recipe, open_source(recipe.source), base, None)
        assert planned is not None  # There is no parent that could have everything.
        plan, listing = planned
    assert listing is not None
    total = plan.samples + len(plan.rejected)
    check_fraction(plan.rejected, total, recipe.max_bad_fraction)
    freeze(plan, listing)
    del listing
    before_build(plan)

    records = Records()
    rows = RowCache(base, plan.samples)
    rejected = list(plan.rejected)
    done = kept = shards = 0
    started = time.monotonic()
    with progress("shard", plan.samples, "images") as bar:
        for record, reused in _build(plan, recipe.num_workers, keep):
            records.add(record)
            shards += 1
            rejected += record.rejected
            kept += reused
            done += plan.shards[record.number].rows
            rate = done / (time.monotonic() - started)
            bar.update(done, images_per_second=rate, shards=shards, rejected=len(rejected))
            check_fraction(rejected, total, recipe.max_bad_fraction)
            rows.read_ahead(record)
            meanwhile()
    if kept:
        say(f"shard: {kept} of {shards} shards were finished before and are kept")
    corpus = commit(
        base,
        records,
        class_names=plan.class_names,
        current=None,
        rejected=plan.rejected,
        ignored=plan.ignored,
        source=recipe.source,
        recipe={name: value for name, value in identity.deciding_fields(recipe).items() if name != "destination"},
        multi_label=plan.multi_label,
        duplicates=recipe.duplicates,
        is_current=False,
        rows=rows,
    )
    _tell(corpus.head)
    return corpus


def _entries(recipe: ShardRecipe, source: Source, parent: Corpus | None) -> tuple[Entries, tuple[str, ...] | None]:
    """What the source holds, or of it what the parent has not; and the class names."""
    from pipelines.corpus.errors import CorpusError
    from pipelines.corpus.grow import only_new

    if recipe.shuffle and source.kind != "tars":
        raise CorpusError(
            f"shuffle has no effect on {recipe.source}: only tars have an order of their own; leave it out"
        )
    entries = source.entries(min_classes=2 if parent is None else 1, num_workers=recipe.num_workers)
    if parent is None:
        return entries, recipe.classes
    entries = only_new(entries, parent, source.kind)
    old = parent.class_names
    if entries.class_names is not None and entries.class_names[: len(old)] != old:
        raise CorpusError(f"{recipe.source} names its classes otherwise than {parent.reference}; names must agree")
    found = (
        recipe.classes or entries.class_names or tuple(sorted(name for name in entries.labels if isinstance(name, str)))
    )
    entries.class_names = None
    return entries, (*old, *(name for name in found if name not in old))


def _plan(recipe: ShardRecipe, source: Source, base: str, parent: Corpus | None) -> tuple[Plan, Listing] | None:
    """The plan and its listing; None if the parent has everything."""
    from dataclasses import asdict

    from pipelines.corpus.plan import make_plan

    entries, classes = _entries(recipe, source, parent)
    if not len(entries):
        return None
    return make_plan(
        base,
        entries,
        kind=source.kind,
        source=recipe.source,
        seed=recipe.seed,
        shard_bytes=recipe.shard_bytes,
        splits=recipe.splits,
        classes=classes,
        validate=recipe.validate,
        shuffle=recipe.shuffle,
        resize=asdict(recipe.resize) if recipe.resize else None,
        jpeg=recipe.jpeg,
    )


def _build(plan: Plan, num_workers: int | None, keep: bool) -> Iterator[tuple[ShardRecord, bool]]:
    """Every shard of the plan: in order in this process, or as Ray Data finishes them."""
    from pipelines.corpus.build import finished_numbers
    from pipelines.corpus.commit import ShardRecord
    from pipelines.corpus.parallel import map_items

    known = finished_numbers(plan) if keep else frozenset[int]()
    items = [{"number": shard.number, "keep": shard.number in known} for shard in plan.shards]
    for _, done in map_items(_build_one, items, plan.uri, num_workers=num_workers):
        yield ShardRecord.from_json(done["record"]), done["reused"]


def _build_one(item: Mapping[str, Any], plan_uri: str) -> Mapping[str, Any] | Callable[[], Mapping[str, Any]]:
    from pipelines.corpus.build import begin_shard

    begun = begin_shard(plan_uri, item["number"], keep=item["keep"])
    if callable(begun):
        return lambda: {"record": begun().to_json(), "reused": False}
    return {"record": begun.to_json(), "reused": True}


def _tell(head: Head) -> None:
    """What was left out and what is odd, in words; the same counts stand in the manifest and in MLflow."""
    for kind, counts in {"rejected": head.rejected, "kept": head.noted, "ignored": head.ignored}.items():
        if counts:
            share = f" ({head.bad_fraction:.2%} bad)" if kind == "rejected" else ""
            say(f"shard: {kind} " + ", ".join(f"{count:,} {name}" for name, count in counts.items()) + share)
    if across := head.duplicates.get("across_splits"):
        log.warning("%d images occur in more than one split: held-out figures will look better than they are", across)
