"""Stage `shard`: raw images in, a corpus (WebDataset tars and a versioned manifest) out. Plan first, manifest last."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity, store
from pipelines.config import Strict, how, input_
from pipelines.identity import Attempt, StageResult
from pipelines.progress import progress, say

if TYPE_CHECKING:
    from pipelines.corpus.commit import ShardRecord
    from pipelines.corpus.manifest import Corpus, Head
    from pipelines.corpus.plan import Plan
    from pipelines.corpus.sources import Source

__all__ = ["STAGE", "VERSION", "ShardRecipe", "make_corpus", "run"]

STAGE = "shard"
VERSION = 1
MAX_TASKS = 2048  # Tasks of one execution; with more shards than that a task makes several.
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecipe(Strict):
    """Raw images to a corpus."""

    source: str = input_()  # Folder or s3://BUCKET/PREFIX of class folders, IDX files or WebDataset tars.
    destination: str  # Name of the corpus, or a folder or s3:// prefix for it.
    shard_bytes: int = 100_000_000  # Source bytes of one shard.
    seed: int = 0  # Of the order in which images are laid into shards.
    splits: dict[str, float] | None = None  # Fractions of train by hash of the path; null: as the source has it.
    classes: tuple[str, ...] | None = None  # Class names in order of the label; null: as found, sorted.
    validate: Literal["header", "decode"] = "decode"  # How far each image is looked at.
    jpeg: Literal["keep", "tiled"] = "keep"  # tiled: restart markers, so that readers decode less; same pixels.
    max_bad_fraction: float = 0.01  # Fail when more images than this are bad.
    num_workers: int | None = how(default=None)  # Shards made at a time; null: one a CPU of the cluster; 0: no Ray.

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes={self.shard_bytes} is below 1; 100000000 is usual")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} is not between 0 and 1")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} is below 0; leave it out for one per CPU")
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
    from pipelines.corpus.sources import open_source

    source = open_source(recipe.source)
    return identity.run_stage(STAGE, VERSION, recipe, {"source": source.digest}, partial(_work, recipe, source))


def _work(recipe: ShardRecipe, source: Source, attempt: Attempt) -> StageResult:
    from pipelines.tracking.run import track

    with track(attempt, recipe, tags={"vit.source_kind": source.kind}) as run:
        started = time.monotonic()
        corpus = make_corpus(recipe, source, keep=not identity.AGAIN.get(), before_commit=attempt.check)
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
    *,
    keep: bool = True,
    before_commit: Callable[[], None] = lambda: None,
) -> Corpus:
    """The work itself, without identity and tracking. `keep` takes over shards that an earlier attempt finished."""
    from pipelines.corpus.commit import commit, current_etag
    from pipelines.corpus.manifest import corpus_base
    from pipelines.corpus.plan import freeze, make_plan
    from pipelines.corpus.quarantine import check_fraction
    from pipelines.corpus.sources import open_source
    from pipelines.corpus.tiled import check_tiling

    if recipe.jpeg == "tiled":
        check_tiling()
    source = source or open_source(recipe.source)
    base = corpus_base(recipe.destination)
    current = current_etag(base)
    plan, listing = make_plan(
        base,
        source.entries(),
        kind=source.kind,
        source=recipe.source,
        seed=recipe.seed,
        shard_bytes=recipe.shard_bytes,
        splits=recipe.splits,
        classes=recipe.classes,
        validate=recipe.validate,
        jpeg=recipe.jpeg,
    )
    total = plan.samples + len(plan.rejected)
    check_fraction(plan.rejected, total, recipe.max_bad_fraction)
    freeze(plan, listing)
    del listing

    records: list[ShardRecord] = []
    rejected = list(plan.rejected)
    done = kept = 0
    started = time.monotonic()
    with progress("shard", plan.samples, "images") as bar:
        for record, reused in _build(plan, recipe.num_workers, keep):
            records.append(record)
            rejected += record.rejected
            kept += reused
            done += plan.shards[record.number].rows
            rate = done / (time.monotonic() - started)
            bar.update(done, images_per_second=rate, shards=len(records), rejected=len(rejected))
            check_fraction(rejected, total, recipe.max_bad_fraction)
    if kept:
        say(f"shard: {kept} of {len(records)} shards were finished before and are kept")
    before_commit()
    corpus = commit(
        base,
        records,
        class_names=plan.class_names,
        current=current,
        rejected=plan.rejected,
        ignored=plan.ignored,
        source=recipe.source,
        recipe={name: value for name, value in identity.deciding_fields(recipe).items() if name != "destination"},
    )
    _tell(corpus.head)
    return corpus


def _build(plan: Plan, num_workers: int | None, keep: bool) -> Iterator[tuple[ShardRecord, bool]]:
    """Every shard of the plan: in order in this process, or as Ray Data finishes them."""
    from pipelines.corpus.build import build_shard
    from pipelines.corpus.commit import ShardRecord
    from pipelines.corpus.errors import CorpusError

    if num_workers == 0:
        yield from (build_shard(plan.uri, shard.number, keep=keep) for shard in plan.shards)
        return
    import ray

    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="WARNING")
    # Our own bar says more, and Ray Data logs the trace of an error that we report ourselves.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    numbers = ray.data.range(len(plan.shards), override_num_blocks=min(len(plan.shards), MAX_TASKS))
    made = numbers.map_batches(_build_batch, fn_args=(plan.uri, keep), batch_size=None, concurrency=num_workers)
    for row in made.iter_rows():
        if row["error"]:
            raise CorpusError(row["error"])
        yield ShardRecord.from_json(json.loads(row["record"])), bool(row["reused"])


def _build_batch(batch: dict[str, Any], plan_uri: str, keep: bool) -> dict[str, list[Any]]:
    """Expected errors travel as text: Ray would wrap them in its own trace."""
    from pipelines.corpus.build import build_shard
    from pipelines.corpus.errors import CorpusError

    out: dict[str, list[Any]] = {"record": [], "reused": [], "error": []}
    for number in batch["id"].tolist():
        record, reused, error = "", False, ""
        try:
            made, reused = build_shard(plan_uri, number, keep=keep)
            record = json.dumps(made.to_json())
        except (CorpusError, store.StoreError, OSError) as problem:
            error = str(problem)
        out["record"].append(record)
        out["reused"].append(reused)
        out["error"].append(error)
        if error:
            break
    return out


def _tell(head: Head) -> None:
    """What was left out and what is odd, in words; the same counts stand in the manifest and in MLflow."""
    for kind, counts in {"rejected": head.rejected, "kept": head.noted, "ignored": head.ignored}.items():
        if counts:
            say(f"shard: {kind} " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
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
        "bad_fraction": rejected / (head.samples + rejected),
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
    }


def _first_rejected(corpus: Corpus) -> str:
    """The first thousand images of the quarantine, a line each, for the MLflow run."""
    rows = corpus.quarantine().slice(0, 1000).to_pylist()
    return "".join(f"{row['source']}\t{row['reason']}\t{row['detail']}\n" for row in rows)
