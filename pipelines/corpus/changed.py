"""Images that a corpus has taken in and that are not the same any more: never a silent "we have that already".

The frozen plans know the ETag under which each path was read. Where it is another one now, or no plan is left, the
bytes are read and held against the hash in the sample table: a file that was only touched or copied is the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines import store
from pipelines.corpus.entries import Entries
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.fetch import Planned, fetch
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.rows import tar_rows
from pipelines.corpus.tables import read_table
from pipelines.corpus.tar import sample_key

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SHARD_NAME", "check_unchanged"]

SHARD_NAME = re.compile(r"-([0-9a-f]{12})-([0-9]{6,})\.tar$")  # The plan that made it, and its number there.
SHOWN = 3
TOGETHER = 4096


def check_unchanged(entries: Entries, rows: NDArray[np.int64], parent: Corpus, kind: str) -> None:
    """`rows` of the entries have a path that the parent has too. Raises CorpusError for those with other bytes."""
    touched = rows[~_same_etag(entries, rows, parent)]
    if not len(touched):
        return
    content = _content(parent, {sample_key(path) for path in entries.path.take(touched.tolist())})
    changed: list[str] = []
    for start in range(0, len(touched), TOGETHER):
        planned = _planned(entries, touched[start : start + TOGETHER].tolist())
        for row, image in zip(planned, fetch(kind, planned), strict=True):
            wanted = content[sample_key(row.path)]
            if not isinstance(image, bytes) or wanted is None or hashlib.sha256(image).digest()[:16] != wanted:
                changed.append(row.path)
    if changed:
        more = f" and {len(changed) - SHOWN:,} more" if len(changed) > SHOWN else ""
        raise CorpusError(
            f"{len(changed):,} images have changed since {parent.reference} took them in: {', '.join(changed[:SHOWN])}"
            f"{more}; a version never changes: give the new ones other names (and withdraw the old ones with"
            " `vit corpus exclude`), or shard the source to another destination"
        )


def _same_etag(entries: Entries, rows: NDArray[np.int64], parent: Corpus) -> NDArray[np.bool_]:
    """Which of the rows a plan has listed under the ETag that they have now."""
    keys = np.frombuffer(entries.keys, np.uint64)[rows]
    order = np.argsort(keys)
    keys = keys[order]
    same = np.zeros(len(rows), np.bool_)
    for path, etag in _listed(parent):
        wanted = np.array([int(sample_key(one), 16) for one in path], np.uint64)
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        hits = np.flatnonzero(keys[place] == wanted)
        found = order[place[hits]]
        now = entries.etag.take(rows[found].tolist())
        same[found] |= np.array([etag[hit] == one for hit, one in zip(hits.tolist(), now, strict=True)], np.bool_)
    return same


def _listed(parent: Corpus) -> Iterator[tuple[list[str], list[str]]]:
    """Path and ETag of everything that was planned for the shards of the corpus, part by part."""
    layout = parent.layout
    plans: dict[str, set[str]] = {}  # By the place of the version that wrote the shards.
    for shard, name in enumerate(layout.name.to_pylist()):
        if made := SHARD_NAME.search(name):
            source = 0 if layout.source is None else int(layout.source[shard])
            base = (parent.head.sources[source].uri if parent.head.sources else "") or parent.uri
            plans.setdefault(base, set()).add(made[1])
    for base, wanted in plans.items():
        folder = store.join(base, "plans")
        for info in store.list_objects(folder):
            plan, _, part = info.uri.removeprefix(folder).lstrip("/").partition("/")
            if plan[:12] in wanted and part.startswith("listing/"):
                table = read_table(info.uri, ["path", "etag"])
                yield table["path"].to_pylist(), table["etag"].to_pylist()


def _content(parent: Corpus, wanted: set[str]) -> dict[str, Any]:
    """Of each key the hash of its image; None where the recipe made other bytes of it."""
    found: dict[str, Any] = dict.fromkeys(wanted)
    recipes = [parent.source(number).head.recipe for number in range(len(parent.head.sources))] or [parent.head.recipe]
    if any(recipe.get("resize") or recipe.get("jpeg", "keep") != "keep" for recipe in recipes):
        return found
    for split in parent.splits:
        for table in tar_rows(parent, split, ["source", "content"]):
            for path, content in zip(table["source"].to_pylist(), table["content"].to_pylist(), strict=True):
                if (key := sample_key(path)) in found:
                    found[key] = content
    return found


def _planned(entries: Entries, rows: Sequence[int]) -> list[Planned]:
    paths = entries.path.take(rows)
    columns = (paths, entries.uris(rows, paths), entries.etag.take(rows))
    return [
        Planned(path, uri, entries.offset[row], entries.size[row], etag, -1)
        for row, path, uri, etag in zip(rows, *columns, strict=True)
    ]
