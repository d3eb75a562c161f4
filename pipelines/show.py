"""Stage `show`: what a corpus looks like, as one HTML report: counts, shapes, copies, a contact sheet per class."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines import identity, store
from pipelines.config import Strict, how, input_
from pipelines.identity import Attempt, StageResult
from pipelines.progress import say

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus

__all__ = ["STAGE", "VERSION", "ShowRecipe", "make_report", "run"]

STAGE = "show"
VERSION = 1
THUMBNAIL = 92  # Pixels of the longer side.


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowRecipe(Strict):
    """A corpus to a report about it."""

    SUBJECT: ClassVar[str] = "corpus"

    corpus: str = input_()  # NAME@version, a folder or an s3:// prefix; without @version the current one.
    images_per_class: int = 12  # In each contact sheet; 0: none.
    max_classes: int = 100  # With a contact sheet; of more, these are spread over the label space.
    compared: int = 2000  # Images that are compared for nearness; more than the corpus has: all.
    output: str | None = how(default=None)  # A copy of the report, as a local file.

    def __post_init__(self) -> None:
        for name in ("images_per_class", "max_classes", "compared"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0")
        if self.compared > 50_000:
            raise ValueError(f"compared={self.compared} is above 50000: every pair is looked at")


def run(recipe: ShowRecipe) -> StageResult:
    """Make the report, or return the one of the same corpus and recipe."""
    from pipelines.verify import open_reference

    corpus = open_reference(recipe.corpus)
    # Two places may hold one version: the report names the place.
    inputs = {"corpus": corpus.digest, "place": corpus.uri}
    if corpus.account:
        inputs["account"] = corpus.account
    version = VERSION + (corpus.layout.times is not None)  # Raised for corpora of which not every image comes once.
    result = identity.run_stage(STAGE, version, recipe, inputs, partial(_work, recipe, corpus))
    if recipe.output is not None:
        path = Path(recipe.output).expanduser().absolute()
        store.write(str(path), store.read(result.uri))
        say(f"show: {path}")
    return result


def _work(recipe: ShowRecipe, corpus: Corpus, attempt: Attempt) -> StageResult:
    from pipelines.tracking.run import track

    with track(attempt, recipe, corpus=corpus) as run:
        started = time.monotonic()
        html, metrics = make_report(recipe, corpus)
        uri = store.join(attempt.uri, "report.html")
        attempt.check()
        store.write(uri, html.encode())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.html"
            path.write_text(html, encoding="utf-8")
            run.log_artifact(path)
        metrics |= {"seconds": time.monotonic() - started}
        run.log_metrics(metrics, step=0)
        return attempt.result(uri=uri, run_id=run.id, metrics=metrics, corpus=corpus.reference)


def make_report(recipe: ShowRecipe, corpus: Corpus) -> tuple[str, dict[str, float]]:
    """The report and its figures, without identity and tracking."""
    from pipelines.corpus.report import report
    from pipelines.corpus.survey import survey

    classes = _shown_classes(recipe, corpus)
    found = survey(
        corpus,
        classes=classes,
        per_class=recipe.images_per_class if classes is None or classes else 0,
        compared=recipe.compared,
        side=THUMBNAIL,
    )
    html = report(
        corpus,
        found,
        sheets_of=len(corpus.class_names) if classes is None else len(classes),
        exact=corpus.head.duplicates,
    )
    metrics = {
        "images": float(found.samples),
        "classes": float(len(corpus.class_names)),
        "smallest_class": float(found.total.min()),
        "largest_class": float(found.total.max()),
        "exact_copies": float(corpus.head.duplicates.get("images", 0)),
        "compared": float(found.compared),
        "near_pairs": float(len(found.near)),
        "rejected": float(sum(corpus.head.rejected.values())),
    }
    return html, metrics


def _shown_classes(recipe: ShowRecipe, corpus: Corpus) -> list[int] | None:
    """None: all of them; else as many as wanted, spread evenly over the label space."""
    total, wanted = len(corpus.class_names), recipe.max_classes
    return None if total <= wanted else [total * i // wanted for i in range(wanted)]
