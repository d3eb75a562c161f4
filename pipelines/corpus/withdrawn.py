"""What was withdrawn from a corpus stays out of it, also when it is made anew from its source.

A takedown list and a scheduled `vit shard` meet at one destination. So a run looks at what stands there before it
begins: its withdrawn images are an input of the run, and the version that it makes leaves them out.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.corpus.commit import Description, current_etag
from pipelines.corpus.errors import ManifestError
from pipelines.corpus.grow import quarantined
from pipelines.corpus.manifest import Corpus, corpus_base, open_corpus
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.rows import tar_rows
from pipelines.corpus.selection import present
from pipelines.corpus.views import Part, write_view
from pipelines.identity import canonical
from pipelines.progress import say

__all__ = ["Destination", "keep_withdrawn", "look_at"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Destination:
    """A place for a corpus as a run finds it."""

    base: str
    current: str | None  # ETag of current.json: who moves it meanwhile is noticed at the end.
    version: Corpus | None  # To which current.json pointed then.

    @property
    def parent(self) -> Corpus:
        """What an append adds to. Raises ManifestError if there is nothing."""
        return self.version or open_corpus(f"{self.base}@current")

    @property
    def withdrawn(self) -> list[Rejected]:
        if self.version is None or not self.version.head.rejected.get("withdrawn"):
            return []
        return [item for item in quarantined(self.version) if item.reason == "withdrawn"]

    @property
    def inputs(self) -> dict[str, str]:
        """For the identity of a run: nothing where nothing was withdrawn."""
        sources = sorted(item.source or item.key for item in self.withdrawn)
        return {"withdrawn": hashlib.sha256(canonical(sources).encode()).hexdigest()} if sources else {}


def look_at(destination: str) -> Destination:
    base = corpus_base(destination)
    current = current_etag(base)  # Before the version: one that came in between is then a conflict, not overlooked.
    version = None
    if current is not None:
        try:
            version = open_corpus(f"{base}@current")
        except ManifestError as error:
            log.warning("%s; if images were withdrawn from that version, they come again", error)
    return Destination(base, current, version)


def keep_withdrawn(made: Corpus, destination: Destination) -> Corpus:
    """`made` without the images that were withdrawn from what stands at the destination. Not made current."""
    before = destination.withdrawn
    if not before:
        return made
    assert destination.version is not None
    out = {item.source or item.key for item in before}
    times: dict[str, Any] = {}
    count = 0
    for split in made.splits:
        times[split] = present(made, split).copy()
        first = 0
        for table in tar_rows(made, split, ["source", "key"]):
            names = zip(table["source"].to_pylist(), table["key"].to_pylist(), strict=True)
            hits = np.array([(source or key) in out for source, key in names], np.bool_)
            own = times[split][first : first + table.num_rows]
            count += int((own[hits] > 0).sum())
            own[hits] = 0
            first += table.num_rows
    numbers = {name: number for number, name in enumerate(made.class_names)}
    former = dict(enumerate(destination.version.class_names))
    kept = [replace(item, label=numbers.get(former.get(item.label, ""), -1)) for item in before]
    head = made.head
    described = Description(
        class_names=head.class_names,
        multi_label=head.multi_label,
        noted=head.noted,
        ignored=head.ignored,
        duplicates=head.duplicates,
        parent=made.digest,
        source=head.source,
        recipe=head.recipe,
    )
    if count:
        say(f"{made.uri}: {count:,} images that `vit corpus exclude` withdrew stay out")
    others = [item for item in quarantined(made) if (item.source or item.key) not in out]
    return write_view(made.uri, [Part(made, times)], described, [*others, *kept])
