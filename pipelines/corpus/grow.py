"""New versions of a corpus from an old one: images added, images withdrawn. Old shards are not written again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines import store
from pipelines.corpus.changed import check_unchanged
from pipelines.corpus.commit import Description, current_etag, make_current
from pipelines.corpus.entries import Entries
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.joined import join_copies
from pipelines.corpus.manifest import Corpus, corpus_base, open_corpus
from pipelines.corpus.quarantine import BY_CHOICE, Rejected
from pipelines.corpus.rows import tar_rows
from pipelines.corpus.selection import present
from pipelines.corpus.tar import sample_key
from pipelines.corpus.views import Part, write_view

__all__ = [
    "NothingNew",
    "bad_before",
    "exclude",
    "join_versions",
    "name_numbers",
    "only_new",
    "quarantined",
    "versions",
]


log = logging.getLogger(__name__)


class NothingNew(CorpusError):
    """All that the source has is in the parent, or was bad there already and still is."""


def quarantined(corpus: Corpus) -> list[Rejected]:
    """The quarantine of a version, to be handed on to the next one."""
    labels = {name: number for number, name in enumerate(corpus.class_names)}
    return [
        Rejected(row["key"], row["source"], row["split"], labels.get(row["class"], -1), row["reason"], row["detail"])
        for row in corpus.quarantine().to_pylist()
    ]


def bad_before(parent: Corpus | None) -> frozenset[str]:
    """Paths of the images that a version has in quarantine because they are bad."""
    if parent is None:
        return frozenset()
    return frozenset(item.source for item in quarantined(parent) if item.reason not in BY_CHOICE)


def exclude(reference: str, listed: Iterable[str], source: str = "", *, copies: bool = False) -> Corpus:
    """Withdraw images, named by key or by relative path, as the new current version. Raises CorpusError.

    `copies`: every other image of the same bytes too; without it those that go on coming are named.
    """
    current = current_etag(corpus_base(reference.rpartition("@")[0]))  # First: who moves it from now on is noticed.
    corpus = open_corpus(reference)
    wanted = {line.strip() for line in listed if line.strip()}
    if not wanted:
        raise CorpusError(f"{source or 'the list'} names no image; it takes a key or a relative path a line")
    before = {item.source or item.key: item for item in quarantined(corpus)}
    times = {split: present(corpus, split) for split in corpus.splits}
    withdrawn: dict[str, Rejected] = {}
    detail = f"listed in {source}" if source else "listed"

    def withdraw(row: _Row, detail: str) -> None:
        times[row.split] = _without(times[row.split], row.number)
        withdrawn[row.source or row.key] = Rejected(row.key, row.source, row.split, row.label, "withdrawn", detail)

    rows = [row for row in _rows(corpus) if not wanted.isdisjoint((row.key, row.source))]
    # What is in quarantine is listed as withdrawn from now on, whatever was wrong with it: it must not come later.
    others = [item for item in before.values() if not wanted.isdisjoint((item.key, item.source))]
    named = [(row.key, row.source) for row in rows] + [(item.key, item.source) for item in others]
    found = wanted & {name for pair in named for name in pair}
    if missing := sorted(wanted - found):
        raise CorpusError(
            f"{len(missing):,} of {len(wanted):,} listed images are not in {corpus.reference}, such as {missing[0]!r};"
            " a line is a key or a path as in the column `source` of the sample table"
        )
    for item in others:
        if item.reason != "withdrawn":
            withdrawn[item.source or item.key] = replace(item, reason="withdrawn", detail=detail)
    for row in rows:
        if times[row.split][row.number] or (row.source or row.key) not in before:
            withdraw(row, detail)
    content = {row.content: row.source for row in rows}
    same = [row for row in _rows(corpus) if row.content in content and times[row.split][row.number]]
    if copies:
        for row in same:
            withdraw(row, f"{detail} as {content[row.content]}, which has the same bytes")
    elif same:
        log.warning(
            "%d images of the same bytes as withdrawn ones go on coming, such as %s; --copies withdraws them too",
            len(same),
            same[0].source,
        )
    if not withdrawn:
        return corpus
    described = Description(
        class_names=corpus.class_names,
        multi_label=corpus.head.multi_label,
        noted=corpus.head.noted,
        ignored=corpus.head.ignored,
        duplicates=join_copies([(corpus, times)], "keep")[0],
        parent=corpus.digest,
        source=corpus.head.source,
        recipe={"exclude": source},
    )
    kept = [item for name, item in before.items() if name not in withdrawn]
    made = write_view(corpus.uri, [Part(corpus, times)], described, [*kept, *withdrawn.values()])
    make_current(corpus.uri, made.digest, current, made.account)
    return made


@dataclass(slots=True)
class _Row:
    split: str
    number: int  # Of the split's rows in tars.
    key: str
    source: str
    label: int
    content: bytes


def _rows(corpus: Corpus) -> Iterator[_Row]:
    """What lies in the tars, whether it comes or not."""
    for split in corpus.splits:
        first = 0
        for table in tar_rows(corpus, split, ["key", "source", "label", "content"]):
            columns = {name: table[name].to_pylist() for name in table.column_names}
            labels = columns.get("label", [-1] * table.num_rows)
            values = zip(columns["key"], columns["source"], labels, columns["content"], strict=True)
            yield from (_Row(split, first + number, *value) for number, value in enumerate(values))
            first += table.num_rows


def _without(times: np.ndarray, row: int) -> np.ndarray:
    if not times.flags.writeable:
        times = times.copy()
    times[row] = 0
    return times


def only_new(entries: Entries, parent: Corpus, kind: str) -> Entries:
    """The entries whose paths the parent does not have yet. The others are counted; CorpusError if one has changed."""
    if entries.multi_label != parent.head.multi_label:
        kinds = ["one label an image", "a list of labels an image"]
        raise CorpusError(
            f"the source has {kinds[entries.multi_label]}, {parent.reference} has {kinds[parent.head.multi_label]};"
            " give the new images another destination"
        )
    keys = np.frombuffer(entries.keys, np.uint64)
    there = np.isin(keys, _keys_of(parent))
    out = [item.source for item in quarantined(parent) if item.reason == "withdrawn"]
    withdrawn = ~there & np.isin(keys, np.array([int(sample_key(path), 16) for path in out], np.uint64))
    if there.any():
        check_unchanged(entries, np.flatnonzero(there), parent, kind)
        entries.ignored["in_parent"] = int(there.sum())
    if withdrawn.any():
        entries.ignored["withdrawn"] = int(withdrawn.sum())
    return entries.where(~there & ~withdrawn)


def _keys_of(corpus: Corpus) -> NDArray[np.uint64]:
    """The keys of the paths that lie in its tars. By path: adopted tars have keys of their own."""
    parts = [np.empty(0, np.uint64)]
    for split in corpus.splits:
        for table in tar_rows(corpus, split, ["source"]):
            parts.append(np.array([int(sample_key(path), 16) for path in table["source"].to_pylist()], np.uint64))
    return np.concatenate(parts)


def name_numbers(entries: Entries, parent: Corpus, more: Sequence[str]) -> None:
    """Where classes of the parent have numbers for names, a label that is a number means the class of that name.

    Lists and tars do not tell the two apart. `more`: names that the recipe adds. Raises CorpusError.
    """
    names = parent.class_names
    if not any(name.isdecimal() for name in names) or names == tuple(map(str, range(len(names)))):
        return
    known = {*names, *more}
    unknown = [label for label in entries.labels if isinstance(label, int) and str(label) not in known]
    if unknown:
        raise CorpusError(
            f"label {unknown[0]} is no class of {parent.reference}, in which numbers are names such as"
            f" {next(name for name in names if name.isdecimal())!r}: it is not clear which class is meant; write its"
            " name, or add a new one to `classes`"
        )
    entries.labels = {str(label): code for label, code in entries.labels.items()}


def join_versions(parent: Corpus, added: Corpus, duplicates: Literal["keep", "quarantine"] = "keep") -> Corpus:
    """Both as one version, the parent's shards first. Its classes keep their numbers, new ones follow.

    `duplicates` as in the recipe of `shard`, over both.
    """
    parts = [(one, {split: present(one, split) for split in one.splits}) for one in (parent, added)]
    copies, put_away = join_copies(parts, duplicates)
    old, new = parent.head, added.head
    former = {item.source for item in quarantined(parent)}
    seen = {item.source for item in quarantined(added)} | {
        path
        for split in added.splits
        for table in tar_rows(added, split, ["source"])
        for path in table["source"].to_pylist()
        if path in former
    }
    described = Description(
        class_names=added.class_names,
        multi_label=old.multi_label,
        noted=_sum(old.noted, new.noted),
        ignored=new.ignored,
        duplicates=copies,
        parent=parent.digest,
        source=new.source,
        recipe=new.recipe,
    )
    # What was bad before and came again is listed as it is now.
    rejected = [item for item in quarantined(parent) if item.source not in seen] + quarantined(added)
    return write_view(parent.uri, [Part(*one) for one in parts], described, [*rejected, *put_away])


def _sum(*counts: Any) -> dict[str, int]:
    return {name: sum(one.get(name, 0) for one in counts) for name in sorted({name for one in counts for name in one})}


def versions(name: str) -> Sequence[Corpus]:
    """Every version of a corpus, parents before what grew from them, others by digest.

    Without the manifests that are only steps on the way to one: what an append added, and what was materialised.
    """
    newest = open_corpus(f"{name}@current")
    folder = store.join(newest.uri, "manifests")
    digests = [info.uri.split("/")[-2] for info in store.list_objects(folder) if info.uri.endswith("/head.json")]
    found = {digest: open_corpus(f"{newest.uri}@{digest}") for digest in digests}
    heads = [corpus.head for corpus in found.values()]
    steps = {source.digest for head in heads if head.parent for source in head.sources if not source.uri}
    steps |= {str(head.recipe.get("materialised")) for head in heads}
    steps -= {newest.digest, *(head.parent for head in heads)}
    depths: dict[str | None, int] = {None: 0}
    for digest in found:
        chain = []
        one: str | None = digest
        while one not in depths:
            chain.append(one)
            one = found[one].head.parent if one in found else None
        for place, own in enumerate(reversed(chain), 1):
            depths[own] = depths[one] + place
    shown = [corpus for digest, corpus in found.items() if digest not in steps]
    return sorted(shown, key=lambda corpus: (depths[corpus.digest], corpus.digest))
