"""`vit verify`: every byte of a corpus held against its manifest. Says what is wrong; exit code 1 if anything is."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines import store
from pipelines.config import Strict, how, parse
from pipelines.progress import console, progress, say, visible

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus
    from pipelines.corpus.verification import Finding

__all__ = ["Verdict", "VerifyRecipe", "main", "open_reference", "verify"]

LINES = 100  # Of the table that a person reads.


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRecipe(Strict):
    """What is verified, and how far."""

    SUBJECT: ClassVar[str] = "corpus"

    corpus: str  # NAME@version, a folder or an s3:// prefix; without @version the current one.
    deep: bool = False  # Decode every image too.
    num_workers: int | None = how(default=None)  # Tars at a time; null: one a CPU of the cluster; 0: no Ray.


@dataclass(frozen=True, slots=True)
class Verdict:
    findings: list[Finding]
    counts: dict[str, int]  # All findings by kind; only the first of each kind and tar are listed.
    shards: int
    samples: int  # Met whole.
    bytes: int  # Read.
    planned: int  # Tars of unfinished runs.
    needless: int  # Tars of finished runs that no version lists.
    written_again: int  # Tars of the right bytes and another ETag than when they were written.


def main(arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> int:
    """`CORPUS [--deep] [--num-workers N]`. 0: all is as the manifest says, 1: it is not."""
    recipe = parse(VerifyRecipe, arguments, prog="vit verify")
    if not recipe.corpus.startswith(("/", "./")) or recipe.num_workers != 0:
        prepare()
    started = time.monotonic()
    verdict = verify(recipe)
    _tell(recipe, verdict, time.monotonic() - started)
    return 1 if verdict.counts else 0


def open_reference(reference: str) -> Corpus:
    """As `open_corpus`; without a version the current one. A folder may have an "@" in its name."""
    from pipelines.corpus.manifest import open_corpus

    name, at, version = reference.rpartition("@")
    if "/" in reference and not store.is_s3(reference) and Path(reference).expanduser().is_dir():
        at = ""
    return open_corpus(reference if at and name and "/" not in version else f"{reference.rstrip('/')}@current")


def verify(recipe: VerifyRecipe) -> Verdict:
    """Raises ManifestError if there is no such corpus, or its head cannot be read."""
    from pipelines.corpus.errors import ManifestError
    from pipelines.corpus.parallel import map_items
    from pipelines.corpus.verification import Finding, check_manifest, check_shard, stray_tars

    corpus = open_reference(recipe.corpus)
    try:
        findings = list(check_manifest(corpus))
        strays, planned, needless = stray_tars(corpus)
        shards = corpus.shards
    except (ManifestError, store.StoreError) as error:
        return Verdict([Finding("manifest", corpus.manifest, str(error))], {"manifest": 1}, 0, 0, 0, 0, 0, 0)
    findings += strays
    counts = Counter(finding.kind for finding in findings)
    owners = {shard.sha256: shard.name for shard in shards}
    samples = size = done = written_again = 0
    items = [{"shard": number} for number in range(len(shards))]
    with progress("verify", len(shards), "tars") as bar:
        run = uuid.uuid4().hex
        results = map_items(check_shard, items, corpus.reference, recipe.deep, run, num_workers=recipe.num_workers)
        for number, result in results:
            name = shards[number].name
            for kind, detail in result["findings"]:
                if kind == "sha256" and result["sha256"] in owners:
                    detail += f"; these are the bytes of {owners[result['sha256']]}"
                findings.append(Finding(kind, name, detail))
            counts.update(result["counts"])
            samples, size, done = samples + result["samples"], size + result["bytes"], done + 1
            written_again += result["written_again"]
            bar.update(done, samples=samples, problems=sum(counts.values()))
    order = {shard.name: number for number, shard in enumerate(shards)}
    findings.sort(key=lambda finding: order.get(finding.where, -1))
    return Verdict(findings, dict(counts), len(shards), samples, size, planned, needless, written_again)


def _tell(recipe: VerifyRecipe, verdict: Verdict, seconds: float) -> None:
    from rich.table import Table
    from rich.text import Text

    from pipelines.corpus.verification import PROBLEMS

    if verdict.findings:
        table = Table("what", "where", "detail", box=None, pad_edge=False)
        for finding in verdict.findings[:LINES]:
            # Names in tars are other people's text: no markup in it.
            table.add_row(*(Text(visible(part)) for part in (finding.kind, finding.where, finding.detail)))
        console().print(table)
        if (more := sum(verdict.counts.values()) - min(len(verdict.findings), LINES)) > 0:
            say(f"and {more:,} more")
        for kind, count in verdict.counts.items():
            say(f"verify: {count:,} {kind}: {PROBLEMS[kind]}")
    if verdict.planned:
        say(f"verify: {verdict.planned:,} tars belong to runs that are not finished; the same `vit shard` ends them")
    if verdict.needless:
        say(
            f"verify: {verdict.needless:,} tars are of runs whose result was a version that stood already; no version"
            " lists them, they can be deleted"
        )
    if verdict.written_again:
        say(f"verify: {verdict.written_again:,} tars have another ETag and the same bytes: moved, or written again")
    how_far = "every image decoded" if recipe.deep else "image headers walked (--deep decodes every image)"
    say(
        f"verify: {verdict.samples:,} samples in {verdict.shards:,} tars, {verdict.bytes / 1e6:,.0f} MB read in"
        f" {seconds:.1f} s, {how_far}: "
        + ("NOT as the manifest says" if verdict.counts else "all as the manifest says")
    )
