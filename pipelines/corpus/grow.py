"""New versions of a corpus from an old one: images added, images withdrawn. Old shards are not written again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
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


def exclude(reference: str, listed: Iterable[str], source: str = "") -> Corpus:
    """Withdraw images, named by key or by relative path, as the new current version. Raises CorpusError."""
    current = current_etag(corpus_base(reference.rpartition("@")[0]))  # Before the version that it is about is read.
    corpus = open_corpus(reference)
    wanted = {line.strip() for line in listed if line.strip()}
    if not wanted:
        raise CorpusError(f"{source or 'the list'} names no image; it takes a key or a relative path a line")
    before = quarantined(corpus)
    copies = {(item.split, item.key) for item in before if item.reason == "duplicate"}
    found: set[str] = set()
    contents: set[bytes] = set()
    withdrawn: list[Rejected] = []
    times: dict[str, Any] = {}
    for split in corpus.splits:
        times[split] = present(corpus, split)
        first = 0
        for table in tar_rows(corpus, split, ["key", "source", "label", "content"]):
            columns = {name: table[name].to_pylist() for name in table.column_names}
            labels = columns.get("label", [-1] * table.num_rows)
            named = zip(columns["key"], columns["source"], labels, columns["content"], strict=True)
            for row, (key, path, label, content) in enumerate(named):
                if not wanted.isdisjoint((key, path)):
                    found |= wanted & {key, path}
                    contents.add(content)
                    if times[split][first + row] or (split, key) in copies:
                        detail = f"listed in {source}" if source else "listed"
                        withdrawn.append(Rejected(key, path, split, label, "withdrawn", detail))
                        times[split] = _without(times[split], first + row)
            first += table.num_rows
    if missing := sorted(wanted - found):
        raise CorpusError(
            f"{len(missing):,} of {len(wanted):,} listed images are not in {corpus.reference}, such as {missing[0]!r};"
            " a line is a key or a path as in the column `source` of the sample table"
        )
    _tell_copies(corpus, times, contents)
    if not withdrawn:
        return corpus
    gone = {(item.split, item.key) for item in withdrawn}
    kept = [item for item in before if item.reason != "duplicate" or (item.split, item.key) not in gone]
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
    made = write_view(corpus.uri, [Part(corpus, times)], described, [*kept, *withdrawn])
    make_current(corpus.uri, made.digest, current, made.account)
    return made


def _tell_copies(corpus: Corpus, times: Mapping[str, NDArray[np.uint8]], contents: set[bytes]) -> None:
    """A withdrawn picture may go on coming under another name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(sorted(contents), pa.binary(16))
    paths: list[str] = []
    for split in corpus.splits:
        first = 0
        for table in tar_rows(corpus, split, ["source", "content"]):
            comes = pa.array(times[split][first : first + table.num_rows] > 0)
            paths += table.filter(pc.and_(pc.is_in(table["content"], wanted), comes))["source"].to_pylist()
            first += table.num_rows
    if paths:
        log.warning(
            "%d images have the same bytes as listed ones and stay, such as %s; list them too if they are to go",
            len(paths),
            ", ".join(paths[:3]),
        )


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
    there = [  # By path: adopted tars have keys of their own.
        np.array([int(sample_key(path), 16) for path in table["source"].to_pylist()], np.uint64)
        for split in parent.splits
        for table in tar_rows(parent, split, ["source"])
    ]
    new = ~np.isin(np.frombuffer(entries.keys, np.uint64), np.concatenate(there))
    if not new.all():
        check_unchanged(entries, np.flatnonzero(~new), parent, kind)
        entries.ignored["in_parent"] = len(entries) - int(new.sum())
    return entries.where(new)


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
    seen = {item.source for item in quarantined(added)} | {
        path
        for split in added.splits
        for table in tar_rows(added, split, ["source"])
        for path in table["source"].to_pylist()
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
    """Every version of a corpus, parents before what grew from them, others by digest."""
    newest = open_corpus(f"{name}@current")
    folder = store.join(newest.uri, "manifests")
    digests = [info.uri.split("/")[-2] for info in store.list_objects(folder) if info.uri.endswith("/head.json")]
    found = {digest: open_corpus(f"{newest.uri}@{digest}") for digest in digests}
    depths: dict[str | None, int] = {}
    for digest in found:
        line: list[str] = []  # Up to a version whose depth is known, or that is not there.
        above: str | None = digest
        while above in found and above not in depths:
            line.append(above)
            above = found[above].head.parent
        for own in reversed(line):
            depths[own] = depths.get(above, 0) + 1
            above = own
    return sorted(found.values(), key=lambda corpus: (depths[corpus.digest], corpus.digest))
