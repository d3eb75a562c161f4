"""Stage `shard`: raw images in, a corpus (WebDataset tars and a versioned manifest) out. Plan first, manifest last."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity, store
from pipelines.config import Strict, how, in_order, input_
from pipelines.corpus.resize import ResizeConfig
from pipelines.identity import Attempt, StageResult
from pipelines.progress import as_line, progress, say

if TYPE_CHECKING:
    from pipelines.corpus.commit import ShardRecord
    from pipelines.corpus.entries import Entries
    from pipelines.corpus.manifest import Corpus, Head
    from pipelines.corpus.plan import Listing, Plan
    from pipelines.corpus.sources import Source
    from pipelines.corpus.withdrawn import Destination

__all__ = ["STAGE", "VERSION", "ShardRecipe", "make_corpus", "run", "write_shards"]

STAGE = "shard"
VERSION = 1
MOST_LOOKED_AT = 32  # Tars of a finished corpus that are looked for before it is reused.
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecipe(Strict):
    """Raw images to a corpus."""

    source: str = input_()  # Class folders, a list of images, IDX files, WebDataset tars, or CORPUS@VERSION.
    destination: str  # Name of the corpus, or a folder or s3:// prefix for it.
    shard_bytes: int = 100_000_000  # Source bytes of one shard.
    seed: int = 0  # Of the order in which images are laid into shards.
    # Fractions of train by hash of the path, in this order; null: as the source has it.
    splits: dict[str, float] | None = in_order(first=("train", "val", "test"), default=None)
    classes: tuple[str, ...] | None = None  # Class names in order of the label; null: as found, sorted.
    resize: ResizeConfig | None = None  # Make large images smaller; null: all keep their bytes.
    shuffle: bool = False  # Tars: shuffle over all their images, which reads each by itself; else whole tars.
    validate: Literal["header", "decode"] = "decode"  # How far each image is looked at.
    duplicates: Literal["keep", "quarantine"] = "keep"  # Images of equal bytes: keep all, or one of them.
    jpeg: Literal["keep", "tiled"] = "keep"  # tiled: restart markers, so that readers decode less; same pixels.
    max_bad_fraction: float = 0.01  # Fail when more images than this are bad.
    append: bool = False  # Add what is new to the current version of the destination, as its next one.
    restore: bool = False  # Let images come again that `vit corpus exclude` withdrew from the destination.
    num_workers: int | None = how(default=None)  # Shards made at a time; null: one a CPU of the cluster; 0: no Ray.

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes={self.shard_bytes} is below 1; 100000000 is usual")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} is not between 0 and 1")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} is below 0; leave it out for one per CPU")
        if self.append and self.restore:
            raise ValueError("restore has no effect with append, which keeps what is there; leave one of them out")
        if self.splits is not None:
            self._check_splits(self.splits)
        if self.classes is not None:
            if twice := sorted({name for name in self.classes if self.classes.count(name) > 1}):
                raise ValueError(f"classes names {twice[0]!r} twice; class names must differ")
            if len(self.classes) < 2:
                raise ValueError(f"classes={list(self.classes)}: a classifier needs two or more")

    @staticmethod
    def _check_splits(splits: dict[str, float]) -> None:
        for name, fraction in splits.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"splits: {name!r} is no split name; lower-case letters, digits and '_'")
            if not 0 < fraction <= 1:
                raise ValueError(f"splits: {name}={fraction} is not above 0 and at most 1")
        if not math.isclose(total := sum(splits.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"splits add up to {total:g}, they must add up to 1")
        if "train" not in splits:
            raise ValueError(f"splits={splits} has no 'train'; the fractions divide it")


def run(recipe: ShardRecipe) -> StageResult:
    """Make the corpus, or return the one that the same source and recipe made before."""
    from pipelines.corpus.commit import point_to_finished
    from pipelines.corpus.listing import check_apart
    from pipelines.corpus.sources import open_source
    from pipelines.corpus.withdrawn import look_at

    found = look_at(recipe.destination)
    check_apart(recipe.source, found.base)
    source = open_source(recipe.source)
    inputs = {"source": source.digest}
    if recipe.append:
        inputs["parent"] = found.parent.digest
    elif not recipe.restore:
        inputs |= found.inputs
    work = partial(_work, recipe, source, found)
    result = identity.run_stage(STAGE, _version(recipe, source), recipe, inputs, work, missing=lost_object)
    if result.reused:
        point_to_finished(result.uri, result.details.get("account", ""), STAGE, found.current)
    return result


def _version(recipe: ShardRecipe, source: Source) -> int:
    """VERSION, and one more for those recipes alone whose result has changed: all others are found finished."""
    from_corpus = source.kind == "corpus" and (
        recipe.validate == "decode" or recipe.duplicates == "quarantine" or len(source.rows.head.sources) > 1
    )
    return VERSION + (recipe.append or from_corpus or source.has_idle_folders)


def _work(recipe: ShardRecipe, source: Source, found: Destination, attempt: Attempt) -> StageResult:
    from pipelines.tracking.run import track

    with track(attempt, recipe, tags={"vit.source_kind": source.kind}) as run:
        started = time.monotonic()
        corpus = make_corpus(recipe, source, found, before_build=partial(_forget, attempt), before_commit=attempt.check)
        metrics = _metrics(corpus, time.monotonic() - started)
        run.set_tags({"vit.corpus": corpus.reference})
        run.log_metrics(metrics, step=0)
        if rejected := sum(corpus.head.rejected.values()):
            run.log_text(_first_rejected(corpus), "quarantine.txt")
            say(f"shard: {rejected:,} images are in quarantine; quarantine.parquet of the manifest lists them")
        return attempt.result(uri=corpus.reference, run_id=run.id, metrics=metrics, **_details(corpus))


def make_corpus(
    recipe: ShardRecipe,
    source: Source | None = None,
    found: Destination | None = None,
    *,
    keep: bool = True,
    before_build: Callable[[Plan], None] = lambda plan: None,
    before_commit: Callable[[], None] = lambda: None,
) -> Corpus:
    """The work itself, without identity and tracking. `keep` takes over shards that an earlier attempt finished.

    `found` is the destination as it was when the identity of the run was worked out.
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
    source = source or open_source(recipe.source)
    base = found.base
    parent = found.parent if recipe.append else None
    planned = _plan(recipe, source, base, parent)
    if planned is None:
        assert parent is not None
        say(f"shard: {recipe.source} has no usable image that {parent.reference} has not")
        return parent
    with one_writer(base) as check:
        try:
            corpus = write_shards(recipe, *planned, keep=keep, before_build=before_build, parent=parent)
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
        make_current(base, corpus.digest, found.current, corpus.account)
    return corpus


def write_shards(
    recipe: ShardRecipe,
    plan: Plan | None = None,
    listing: Listing | None = None,
    *,
    keep: bool = True,
    before_build: Callable[[Plan], None] = lambda plan: None,
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
    from pipelines.corpus.plan import freeze
    from pipelines.corpus.quarantine import check_fraction
    from pipelines.corpus.sources import open_source

    base = corpus_base(recipe.destination)
    if plan is None:
        planned = _plan(recipe, open_source(recipe.source), base, None)
        assert planned is not None
        plan, listing = planned
    assert listing is not None
    total = plan.samples + len(plan.rejected)
    known = bad_before(parent)
    counted = [item for item in plan.rejected if item.source not in known]
    check_fraction(counted, total, recipe.max_bad_fraction)
    freeze(plan, listing)
    del listing
    before_build(plan)

    records = Records()
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


def _plan(recipe: ShardRecipe, source: Source, base: str, parent: Corpus | None) -> tuple[Plan, Listing] | None:
    """The plan and its listing; None if the parent has everything."""
    from dataclasses import asdict

    from pipelines.corpus.grow import bad_before
    from pipelines.corpus.plan import make_plan
    from pipelines.corpus.quarantine import check_fraction

    entries, classes = _entries(recipe, source, parent)
    if not len(entries):
        known = bad_before(parent)
        new = [item for item in entries.rejected if item.source not in known]
        check_fraction(new, len(new), recipe.max_bad_fraction)
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


def _forget(attempt: Attempt, plan: Plan) -> None:
    """Once for each `--again`: shards that were finished before it began are made again. Resumed, it keeps its own."""
    marker = store.join(attempt.root, "attempts", str(attempt.first), "forgotten.json")
    if attempt.first == 1 or store.exists(marker):
        return
    for info in list(store.list_objects(store.join(plan.uri, "shards"))):
        if info.uri.endswith(".json"):
            store.delete(info.uri)
    store.write_json(marker, {"plan": plan.uri})


def lost_object(result: StageResult) -> str | None:
    """Looks at the manifest and for some of the tars, however many there are."""
    from concurrent.futures import ThreadPoolExecutor

    from pipelines.corpus.manifest import open_corpus
    from pipelines.corpus.whole import lost_manifest

    if problem := lost_manifest(result):
        return problem
    corpus = open_corpus(result.uri)
    shards = corpus.shards
    chosen = range(0, len(shards), -(-len(shards) // MOST_LOOKED_AT))
    with ThreadPoolExecutor(8) as pool:
        for shard, stands in zip(chosen, pool.map(lambda n: store.exists(corpus.shard_uri(n)), chosen), strict=True):
            if not stands:
                return f"{corpus.shard_uri(shard)} of the corpus is gone"
    return None


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


def _metrics(corpus: Corpus, seconds: float) -> dict[str, float]:
    head = corpus.head
    rejected = sum(head.rejected.values())
    return {
        "images": float(head.samples),
        "shards": float(head.shards),
        "bytes": float(head.bytes),
        "rejected": float(rejected),
        "bad_fraction": head.bad_fraction,
        "images_per_second": (head.samples + rejected) / seconds,
        "seconds": seconds,
    }


def _details(corpus: Corpus) -> dict[str, Any]:
    head = corpus.head
    return {
        "corpus": corpus.reference,
        "splits": head.splits,
        "class_names": list(head.class_names),
        "rejected": head.rejected,
        "kept": head.noted,
        "ignored": head.ignored,
        "duplicates": head.duplicates,
        **({"account": corpus.account} if corpus.account else {}),
    }


def _first_rejected(corpus: Corpus) -> str:
    """The first thousand images of the quarantine, a line each, for the MLflow run."""
    rows = corpus.quarantine().slice(0, 1000).to_pylist()
    return "".join(as_line((row["source"], row["reason"], row["detail"])) for row in rows)
