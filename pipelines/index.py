"""Stage `index`: WebDataset tars that others wrote become a corpus where they lie. Nothing is copied or changed."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipelines import identity, store
from pipelines.config import Strict, how, input_
from pipelines.identity import Attempt, StageResult
from pipelines.progress import as_line, progress, say

if TYPE_CHECKING:
    from pipelines.corpus.adoption import TarListing
    from pipelines.corpus.anomalies import Anomaly
    from pipelines.corpus.manifest import Corpus
    from pipelines.corpus.scanned import ScannedTar
    from pipelines.corpus.withdrawn import Destination

__all__ = ["STAGE", "VERSION", "IndexRecipe", "adopt_tars", "run"]

STAGE = "index"
VERSION = 1
DAMAGED_SHOWN = 5
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRecipe(Strict):
    """Tars of others to a corpus, in place."""

    SUBJECT: ClassVar[str] = "source"

    source: str = input_()  # Folder or s3://BUCKET/PREFIX with WebDataset tars in it, or one tar.
    destination: str | None = (
        None  # Where the manifest goes: a corpus name, a folder or s3:// prefix; null: to the tars.
    )
    split: str = "train"  # Of tars whose folder and name say none.
    classes: tuple[str, ...] | None = None  # Class names in order of the label; null: as found, sorted.
    validate: Literal["header", "decode"] = "decode"  # How far each image is looked at.
    max_bad_fraction: float = 0.01  # Fail when more samples than this are bad.
    damaged: Literal["fail", "keep"] = "fail"  # A tar that breaks off: an error, or its samples up to there.
    num_workers: int | None = how(default=None)  # Tars scanned at a time; null: one a CPU of the cluster; 0: no Ray.

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} is not between 0 and 1")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} is below 0; leave it out for one per CPU")
        if not self.split.isidentifier() or self.split != self.split.lower():
            raise ValueError(f"split={self.split!r} is no split name; lower-case letters, digits and '_'")
        if self.classes is not None and len(set(self.classes)) < max(2, len(self.classes)):
            raise ValueError(f"classes={list(self.classes)}: a classifier needs two or more, with different names")


@dataclass(frozen=True, slots=True)
class Adopted:
    corpus: Corpus
    anomalies: dict[str, int]  # By kind of corpus.anomalies.ANOMALIES.
    listed: list[Anomaly]
    reused: int  # Tars that were not read again.


def run(recipe: IndexRecipe) -> StageResult:
    """Make the manifest, or return the one that the same tars and recipe made before."""
    from pipelines.corpus.adoption import list_tars
    from pipelines.corpus.commit import point_to_finished
    from pipelines.corpus.whole import lost_manifest
    from pipelines.corpus.withdrawn import look_at

    listing = list_tars(recipe.source)
    # The place is part of the identity: the same tars in another place are another corpus to open.
    found = look_at(recipe.destination or listing.base)
    recipe = dataclasses.replace(recipe, destination=found.base)
    inputs = {"source": listing.digest, **found.inputs}
    work = partial(_work, recipe, listing, found)
    result = identity.run_stage(STAGE, VERSION, recipe, inputs, work, missing=lost_manifest)
    return point_to_finished(result, found.current)


def _work(recipe: IndexRecipe, listing: TarListing, found: Destination, attempt: Attempt) -> StageResult:
    from pipelines.tracking.run import track

    with track(attempt, recipe) as run:
        started = time.monotonic()
        adopted = adopt_tars(recipe, listing, found, keep=not identity.AGAIN.get(), before_commit=attempt.check)
        corpus, head = adopted.corpus, adopted.corpus.head
        seconds = time.monotonic() - started
        rejected = sum(head.rejected.values())
        metrics = {
            "images": float(head.samples),
            "shards": float(head.shards),
            "bytes": float(head.bytes),
            "rejected": float(rejected),
            "bad_fraction": head.bad_fraction,
            "anomalies": float(sum(adopted.anomalies.values())),
            "tars_read": float(len(listing.tars) - adopted.reused),
            "images_per_second": (head.samples + rejected) / seconds,
            "seconds": seconds,
        }
        run.set_tags({"vit.corpus": corpus.reference})
        run.log_metrics(metrics, step=0)
        if adopted.listed:
            run.log_text(_as_text(adopted.listed), "anomalies.txt")
        return attempt.result(
            uri=corpus.reference,
            run_id=run.id,
            metrics=metrics,
            corpus=corpus.reference,
            splits=head.splits,
            class_names=list(head.class_names),
            rejected=head.rejected,
            kept=head.noted,
            ignored=head.ignored,
            duplicates=head.duplicates,
            anomalies=adopted.anomalies,
            **({"account": corpus.account} if corpus.account else {}),
        )


def adopt_tars(
    recipe: IndexRecipe,
    listing: TarListing | None = None,
    found: Destination | None = None,
    *,
    keep: bool = True,
    before_commit: Callable[[], None] = lambda: None,
) -> Adopted:
    """The work itself, without identity and tracking. `keep` takes over what former scans found in unchanged tars."""
    from pipelines.corpus.adoption import (
        count_anomalies,
        list_tars,
        name_labels,
        point_to,
        shard_records,
        shared_keys,
        split_of,
    )
    from pipelines.corpus.anomalies import anomaly_table
    from pipelines.corpus.commit import Records, commit, make_current, one_writer
    from pipelines.corpus.quarantine import check_fraction
    from pipelines.corpus.withdrawn import keep_withdrawn, look_at

    listing = listing or list_tars(recipe.source)
    found = found or look_at(recipe.destination or listing.base)
    base = found.base
    splits = [split_of(tar.path, recipe.split) for tar in listing.tars]
    places, scans, reused = _scan(recipe, listing, splits, base, keep)
    _check_damage(recipe, listing, scans)
    rejected = [item for scan in scans for item in scan.rejected]
    check_fraction(rejected, sum(scan.samples for scan in scans) + len(rejected), recipe.max_bad_fraction)

    class_names, numbers = name_labels(scans, listing.tars, recipe.classes, recipe.source)
    shared, shown = shared_keys(listing.tars, places)
    counts = count_anomalies(scans, shared)
    listed = [anomaly for scan in scans for anomaly in scan.anomalies] + shown
    records = Records(shard_records(listing, base, splits, places, scans, numbers))
    ignored = _sum([listing.ignored, *(scan.ignored for scan in scans)])
    with one_writer(base) as check:
        check()
        before_commit()
        corpus = commit(
            base,
            records,
            class_names=class_names,
            current=None,
            ignored=ignored,
            source=listing.covered,
            recipe={"stage": STAGE, **_deciding(recipe)},
            tables={"anomalies": anomaly_table(listed)},
            multi_label=any(scan.multi_label for scan in scans),
            is_current=False,
        )
        corpus = keep_withdrawn(point_to(corpus, records), found)
        make_current(base, corpus.digest, found.current, corpus.account)
    adopted = Adopted(corpus, counts, listed, reused)
    _tell(adopted)
    return adopted


def _scan(
    recipe: IndexRecipe, listing: TarListing, splits: list[str], base: str, keep: bool
) -> tuple[list[str], list[ScannedTar], int]:
    from pipelines.corpus.adoption import SCAN_VERSION, scan_one
    from pipelines.corpus.parallel import map_items
    from pipelines.corpus.scanned import ScannedTar

    items = [dataclasses.asdict(tar) | {"split": split} for tar, split in zip(listing.tars, splits, strict=True)]
    scans: dict[int, ScannedTar] = {}
    places: dict[int, str] = {}
    folder = store.join(base, "scans", f"{recipe.validate}-v{SCAN_VERSION}")
    arguments = (folder, recipe.validate == "decode", keep)
    try:
        store.write_json(store.join(folder, "about.json"), {"stage": STAGE, "validate": recipe.validate})
    except store.StoreError as error:
        raise store.StoreError(f"{error}; --destination NAME puts the manifest elsewhere, the tars stay") from None
    started = time.monotonic()
    done = reused = samples = 0
    with progress("index", len(items), "tars") as bar:
        for number, found in map_items(scan_one, items, *arguments, num_workers=recipe.num_workers):
            scans[number], places[number] = ScannedTar.from_json(found["scan"]), found["place"]
            reused += found["reused"]
            done += listing.tars[number].size
            samples += scans[number].samples
            rate = done / 1e6 / (time.monotonic() - started)
            bar.update(len(scans), MB_per_second=rate, samples=samples)
    if reused:
        say(f"index: {reused} of {len(items)} tars are as an earlier scan found them and were not read again")
    order = range(len(items))
    return [places[number] for number in order], [scans[number] for number in order], reused


def _check_damage(recipe: IndexRecipe, listing: TarListing, scans: list[ScannedTar]) -> None:
    from pipelines.corpus.errors import SourceError

    broken = [(tar, scan) for tar, scan in zip(listing.tars, scans, strict=True) if scan.damage]
    if not broken:
        return
    lines = [
        f"  {tar.path}: {scan.damage}; {scan.samples:,} samples before it are whole"
        for tar, scan in broken[:DAMAGED_SHOWN]
    ]
    if len(broken) > len(lines):
        lines.append(f"  and {len(broken) - len(lines):,} more")
    text = f"{len(broken):,} of {len(scans):,} tars in {listing.source} break off\n" + "\n".join(lines)
    if recipe.damaged == "fail":
        raise SourceError(
            f"{text}\nfetch them again or take them out; --damaged keep adopts what lies before the damage"
        )
    log.warning("%s", text)


def _deciding(recipe: IndexRecipe) -> dict[str, Any]:
    return {name: value for name, value in identity.deciding_fields(recipe).items() if name != "destination"}


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))


def _tell(adopted: Adopted) -> None:
    """What was left out and what is odd, in words; the same counts stand in the manifest, the result and MLflow."""
    from pipelines.corpus.anomalies import ANOMALIES

    head = adopted.corpus.head
    counts = ", ".join(f"{samples:,} {name}" for name, samples in head.splits.items())
    say(f"index: {counts} in {head.shards:,} tars, {len(head.class_names):,} classes")
    for kind, found in {"rejected": head.rejected, "kept": head.noted, "ignored": head.ignored}.items():
        if found:
            share = f" ({head.bad_fraction:.2%} bad)" if kind == "rejected" else ""
            say(f"index: {kind} " + ", ".join(f"{count:,} {name}" for name, count in found.items()) + share)
    first = {anomaly.kind: anomaly for anomaly in reversed(adopted.listed)}
    for kind, count in adopted.anomalies.items():
        where = " ".join(part for part in (first[kind].shard, first[kind].key, first[kind].detail) if part)
        say(f"index: {count:,} {kind} ({ANOMALIES[kind]}), first: {where}")
    if across := head.duplicates.get("across_splits"):
        log.warning("%d images occur in more than one split: held-out figures will look better than they are", across)


def _as_text(listed: list[Anomaly]) -> str:
    return "".join(as_line((one.kind, one.shard, one.offset, one.key, one.detail)) for one in listed[:1000])
