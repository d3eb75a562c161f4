"""Stage `shard`: raw images in, a corpus (WebDataset tars and a versioned manifest) out."""

from __future__ import annotations

import math
import re
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity, store
from pipelines.config import Strict, how, in_order, input_
from pipelines.corpus.resize import ResizeConfig
from pipelines.identity import Attempt, StageResult
from pipelines.making import make_corpus, write_shards
from pipelines.progress import as_line, say

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus
    from pipelines.corpus.plan import Plan
    from pipelines.corpus.sources import Source
    from pipelines.corpus.withdrawn import Destination

__all__ = ["STAGE", "VERSION", "ShardRecipe", "make_corpus", "run", "write_shards"]

STAGE = "shard"
VERSION = 1
MOST_LOOKED_AT = 32  # Tars of a finished corpus that are looked for before it is reused.


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
    return point_to_finished(result, found.current)


def _version(recipe: ShardRecipe, source: Source) -> int:
    """VERSION, and one more for those recipes alone whose result has changed: all others are found finished."""
    from_corpus = source.kind == "corpus" and (
        recipe.validate == "decode" or recipe.duplicates == "quarantine" or len(source.rows.head.sources) > 1
    )
    return VERSION + (recipe.append or from_corpus or source.has_idle_folders)


def _work(recipe: ShardRecipe, source: Source, found: Destination, attempt: Attempt) -> StageResult:
    from pipelines.tracking.client import connect
    from pipelines.tracking.run import track

    began = time.monotonic()
    connect()  # Imports MLflow here: two threads that import at once may meet in half a package.
    # MLflow opens the run while the plan is made and the first shards are. Nothing is committed without it.
    with ExitStack() as stack, ThreadPoolExecutor(1) as beside:
        opening = beside.submit(stack.enter_context, track(attempt, recipe, tags={"vit.source_kind": source.kind}))

        def check_opening() -> None:
            if opening.done():
                opening.result()

        def check() -> None:
            opening.result()
            attempt.check()

        try:
            corpus = make_corpus(
                recipe,
                source,
                found,
                before_build=partial(_forget, attempt),
                meanwhile=check_opening,
                before_commit=check,
            )
        finally:
            wait([opening])  # What is not yet entered cannot be left.
        run = opening.result()
        metrics = _metrics(corpus, time.monotonic() - began)
        run.set_tags({"vit.corpus": corpus.reference})
        run.log_metrics(metrics, step=0)
        if rejected := sum(corpus.head.rejected.values()):
            run.log_text(_first_rejected(corpus), "quarantine.txt")
            say(f"shard: {rejected:,} images are in quarantine; quarantine.parquet of the manifest lists them")
        return attempt.result(uri=corpus.reference, run_id=run.id, metrics=metrics, **_details(corpus))


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
