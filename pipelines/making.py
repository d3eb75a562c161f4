"""A corpus out of a source: plan first, then every shard, and the manifest last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipelines import identity
from pipelines.progress import progress, say

if TYPE_CHECKING:
    from pipelines.corpus.commit import ShardRecord
    from pipelines.corpus.entries import Entries
    from pipelines.corpus.manifest import Corpus, Head
    from pipelines.corpus.plan import Listing, Plan
    from pipelines.corpus.sources import Source
    from pipelines.corpus.withdrawn import Destination
    from pipelines.shard import ShardRecipe

__all__ = ["make_corpus", "write_shards"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Planned:
    """What is about to be written."""

    plan: Plan
    listing: Listing | None

    def take_listing(self) -> Listing:
        """Once: it is large, and nobody needs it when it is written."""
        listing, self.listing = self.listing, None
        assert listing is not None
        return listing


def make_corpus(
    recipe: ShardRecipe,
    source: Source | None = None,
    found: Destination | None = None,
    *,
    keep: bool = True,
    before_build: Callable[[Plan], None] = lambda plan: None,
    meanwhile: Callable[[], None] = lambda: None,
    before_commit: Callable[[], None] = lambda: None,
) -> Corpus:
    """The work itself, without identity and tracking. `keep` takes over shards that an earlier attempt finished.

    `found` is the destination as it was when the identity of the run was worked out. `meanwhile` is called with each
    shard that is done; what it raises ends the work. Raises CorpusError, SourceError.
    """
    from pipelines.corpus.commit import make_current, one_writer
    from pipelines.corpus.grow import NothingNew, join_versions
    from pipelines.corpus.listing import check_apart
    from pipelines.corpus.sources import open_source
    from pipelines.corpus.tiled import check_tiling
    from pipelines.corpus.withdrawn import keep_withdrawn, look_at

    if recipe.jpeg == "tiled":
        check_tiling()
    found = found or look_at(recipe.destination)
    check_apart(recipe.source, found.base)
    parent = found.parent if recipe.append else None
    planned = _plan(recipe, source or open_source(recipe.source), found.base, parent)
    if planned is None:
        assert parent is not None
        say(f"shard: {recipe.source} has no usable image that {parent.reference} has not")
        return parent
    with one_writer(found.base) as check:
        try:
            corpus = write_shards(
                recipe, planned, keep=keep, before_build=before_build, meanwhile=meanwhile, parent=parent
            )
        except NothingNew as error:
            assert parent is not None
            say(f"shard: {error}")
            return parent
        if parent is not None:
            corpus = join_versions(parent, corpus, recipe.duplicates)
        elif not recipe.restore:
            corpus = keep_withdrawn(corpus, found)
        check()
        before_commit()
        make_current(found.base, corpus.digest, found.current, corpus.account)
    return corpus


def write_shards(
    recipe: ShardRecipe,
    planned: Planned | None = None,
    *,
    keep: bool = True,
    before_build: Callable[[Plan], None] = lambda plan: None,
    meanwhile: Callable[[], None] = lambda: None,
    parent: Corpus | None = None,
    view: Corpus | None = None,
) -> Corpus:
    """The shards of a plan and their manifest, not made current; without one that of the recipe.

    Images that were bad in the `parent` already and still are do not count for `max_bad_fraction`. `view` is the
    version whose samples are written into shards of their own: the new one is described as that was.
    """
    from pipelines.corpus.commit import Records, commit
    from pipelines.corpus.grow import NothingNew, bad_before
    from pipelines.corpus.manifest import corpus_base
    from pipelines.corpus.parts import RowCache
    from pipelines.corpus.plan import freeze
    from pipelines.corpus.quarantine import check_fraction
    from pipelines.corpus.sources import open_source

    base = corpus_base(recipe.destination)
    if planned is None:
        planned = _plan(recipe, open_source(recipe.source), base, None)
        assert planned is not None  # There is no parent that could have everything.
    plan = planned.plan
    total = plan.samples + len(plan.rejected)
    known = bad_before(parent)
    counted = [item for item in plan.rejected if item.source not in known]
    check_fraction(counted, total, recipe.max_bad_fraction)
    freeze(plan, planned.take_listing())
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
            counted += [item for item in record.rejected if item.source not in known]
            kept += reused
            done += plan.shards[record.number].rows
            rate = done / (time.monotonic() - started)
            bar.update(done, images_per_second=rate, shards=shards, rejected=len(rejected))
            check_fraction(counted, total - len(rejected) + len(counted), recipe.max_bad_fraction)
            rows.read_ahead(record)
            meanwhile()
    if parent is not None and len(rejected) == total and not counted:
        raise NothingNew(f"{recipe.source} has no usable image that {parent.reference} has not")
    if kept:
        say(f"shard: {kept} of {shards} shards were finished before and are kept")
    corpus = commit(
        base,
        records,
        class_names=plan.class_names,
        current=None,
        rejected=plan.rejected,
        ignored=plan.ignored,
        source=view.head.source if view else recipe.source,
        recipe=view.head.recipe | {"materialised": view.digest} if view else _deciding(recipe),
        multi_label=plan.multi_label,
        duplicates=recipe.duplicates,
        is_current=False,
        rows=rows,
    )
    _tell(corpus.head)
    return corpus


def _deciding(recipe: ShardRecipe) -> dict[str, Any]:
    return {name: value for name, value in identity.deciding_fields(recipe).items() if name != "destination"}


def _entries(recipe: ShardRecipe, source: Source, parent: Corpus | None) -> tuple[Entries, tuple[str, ...] | None]:
    """What the source holds, or of it what the parent has not; and the class names."""
    from pipelines.corpus.errors import CorpusError
    from pipelines.corpus.grow import name_numbers, only_new

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
    if entries.class_names is None:
        name_numbers(entries, parent, recipe.classes or ())
    found = (
        recipe.classes or entries.class_names or tuple(sorted(name for name in entries.labels if isinstance(name, str)))
    )
    entries.class_names = None
    return entries, (*old, *(name for name in found if name not in old))


def _plan(recipe: ShardRecipe, source: Source, base: str, parent: Corpus | None) -> Planned | None:
    """None if the parent has everything."""
    from pipelines.corpus.grow import bad_before
    from pipelines.corpus.plan import make_plan
    from pipelines.corpus.quarantine import check_fraction

    entries, classes = _entries(recipe, source, parent)
    if not len(entries):
        known = bad_before(parent)
        new = [item for item in entries.rejected if item.source not in known]
        check_fraction(new, len(new), recipe.max_bad_fraction)
        return None
    plan, listing = make_plan(
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
    return Planned(plan, listing)


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
