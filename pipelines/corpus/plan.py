"""The frozen plan: which sample goes into which shard, decided before anything is written.

Shard i is a pure function of (plan, i). BASE/plans/DIGEST/{plan.json, listing/*.parquet, shards/*}; plan.json is last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipelines import store
from pipelines.corpus.commit import order_splits
from pipelines.corpus.entries import Entries, Listing
from pipelines.corpus.errors import CorpusError, SourceError
from pipelines.corpus.fetch import Planned
from pipelines.corpus.labels import MAX_CLASSES
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.ranged import open_object
from pipelines.corpus.tar import sample_key
from pipelines.corpus.tiled import Jpeg
from pipelines.identity import canonical

if TYPE_CHECKING:
    pass

__all__ = [
    "Listing",
    "Plan",
    "PlannedShard",
    "Validate",
    "assign_splits",
    "cut",
    "freeze",
    "load_plan",
    "make_plan",
    "mix",
    "permutation",
]

Validate = Literal["header", "decode"]
PLAN_VERSION = 2  # Raised when the same source and recipe would give other shards.
PART_SHARDS = 64  # Shards of one part of the listing; a worker reads the footer of its part and its own row group.
U64 = np.dtype(np.uint64)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    number: int
    split: str
    name: str
    rows: int
    bytes: int  # Of source.
    times: int = 1  # How often each of its samples comes per epoch.


@dataclass(frozen=True, slots=True)
class Plan:
    uri: str
    digest: str
    kind: str
    validate: Validate
    class_names: tuple[str, ...]
    shards: tuple[PlannedShard, ...]
    rejected: tuple[Rejected, ...]  # Found by listing alone; no shard knows them.
    ignored: dict[str, int]
    multi_label: bool = False
    resize: dict[str, Any] | None = None  # Fields of resize.ResizeConfig.
    jpeg: Jpeg = "keep"

    @property
    def base(self) -> str:
        return self.uri.rsplit("/plans/", 1)[0]

    @property
    def samples(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def rows(self, number: int) -> list[Planned]:
        """The samples of one shard, in the order of the tar."""
        import pyarrow.parquet as pq

        uri = store.join(self.uri, "listing", f"{number // PART_SHARDS:06d}.parquet")
        with pq.ParquetFile(open_object(uri)) as file:
            table = file.read_row_group(number % PART_SHARDS)
        names = [field.name for field in dataclasses.fields(Planned) if field.name in table.column_names]
        return [Planned(*row) for row in zip(*(table[name].to_pylist() for name in names), strict=True)]


# Pure laws ----------------------------------------------------------------------------------------------------------


def mix(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers that looks random. Never changes."""
    with np.errstate(over="ignore"):
        x = x + U64.type(0x9E3779B97F4A7C15)
        x = (x ^ (x >> U64.type(30))) * U64.type(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U64.type(27))) * U64.type(0x94D049BB133111EB)
    return x ^ (x >> U64.type(31))


def permutation(keys: np.ndarray[Any, np.dtype[np.uint64]], seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """An order that depends on each key and the seed alone, so new samples never change how old ones compare."""
    mixed = mix(keys ^ mix(np.array([seed % 2**64], np.uint64)))
    return np.argsort(mixed, kind="stable")


def assign_splits(
    keys: np.ndarray[Any, np.dtype[np.uint64]], fractions: Mapping[str, float]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Index into the fractions for each key: a function of the key alone, so growing a corpus moves no sample."""
    bounds = np.cumsum(list(fractions.values()))[:-1]
    return np.searchsorted(bounds, keys.astype(np.float64) / 2.0**64, side="right")


def cut(sizes: np.ndarray[Any, np.dtype[np.int64]], shard_bytes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Shard number of each sample in order: as few shards as the limit allows, all of nearly the same source bytes."""
    total = int(sizes.sum())
    wanted = max(1, -(-total // shard_bytes))
    bounds = np.array([total * i // wanted for i in range(wanted)], np.int64)
    starts = np.cumsum(sizes) - sizes
    numbers = np.searchsorted(bounds, starts, side="right") - 1
    # A sample larger than a shard leaves numbers unused: close them up.
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)


def name_classes(
    labels: Iterable[str | int], classes: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], np.ndarray[Any, np.dtype[np.int32]]]:
    """Class names in order of the label, and the number of each of the labels that occur."""
    labels = list(labels)
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise SourceError(f"source {where} mixes class names and class numbers; use one of them in every label")
    if kinds == {int}:
        low, high = min(map(int, labels)), max(map(int, labels))
        if high >= MAX_CLASSES:
            raise SourceError(f"source {where} has label {high}; class numbers count from 0, up to {MAX_CLASSES - 1:,}")
        names = tuple(classes) if classes is not None else tuple(str(number) for number in range(high + 1))
        if low < 0 or high >= len(names):
            raise SourceError(f"source {where} has labels {low}..{high}, classes names {len(names)}; name every class")
        return names, np.asarray(labels, np.int32)
    names = tuple(classes) if classes is not None else tuple(sorted(map(str, labels)))
    index = {name: number for number, name in enumerate(names)}
    if unknown := sorted(set(map(str, labels)) - index.keys()):
        import difflib

        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise SourceError(f"source {where} has class {unknown[0]!r}, which is not in `classes`{hint}; add it there")
    return names, np.array([index[str(label)] for label in labels], np.int32)


# Making, freezing, loading --------------------------------------------------------------------------------------------


def make_plan(
    base: str,
    entries: Entries,
    *,
    kind: str,
    source: str,
    seed: int,
    shard_bytes: int,
    splits: Mapping[str, float] | None,
    classes: Sequence[str] | None,
    validate: Validate,
    shuffle: bool = False,
    resize: Mapping[str, Any] | None = None,
    jpeg: Jpeg = "keep",
) -> tuple[Plan, Listing]:
    """Decide every shard. Returns the plan and what it plans, not yet written."""
    if classes is not None and entries.class_names is not None and tuple(classes) != entries.class_names:
        raise SourceError(
            f"source {source} names its classes {', '.join(entries.class_names)}, the recipe {', '.join(classes)};"
            " leave `classes` out, or take the file with the names out of the source"
        )
    class_names, class_numbers = name_classes(entries.labels, classes or entries.class_names, source)
    if kind == "tars" and shuffle:
        kind = "tars_shuffled"
    keys = np.frombuffer(entries.keys, np.uint64)
    names, split = _splits(*entries.split_codes(), keys, splits, source)
    sizes = np.frombuffer(entries.size, np.int64)
    order = permutation(keys, seed) if kind != "tars" else _tar_order(entries, seed)
    times = np.frombuffer(entries.times, np.uint8) if entries.times else np.ones(len(entries), np.uint8)

    chosen: list[np.ndarray[Any, Any]] = []
    shards: list[tuple[Any, ...]] = []
    for number, name in enumerate(names):
        for often in np.unique(times).tolist():  # Pages come a whole number of times, with all their samples.
            own = order[(split[order] == number) & (times[order] == often)]
            numbers = cut(sizes[own], shard_bytes)
            for rows in np.split(own, np.flatnonzero(np.diff(numbers)) + 1):
                if len(rows):
                    chosen.append(rows)
                    shards.append((name, len(rows), int(sizes[rows].sum()), *([often] if often > 1 else [])))
    del order
    listing = Listing(entries, np.concatenate(chosen), class_numbers, [shard[1] for shard in shards])
    more: dict[str, Any] = {"resize": dict(resize)} if resize else {}
    if jpeg != "keep":
        more["jpeg"] = jpeg
    digest = _digest(listing, [PLAN_VERSION, kind, list(class_names), validate, [list(s) for s in shards], more])
    return (
        Plan(
            uri=store.join(base, "plans", digest),
            digest=digest,
            kind=kind,
            validate=validate,
            class_names=class_names,
            shards=tuple(
                PlannedShard(number, name, f"{name}-{digest[:12]}-{number:06d}.tar", count, size, *often)
                for number, (name, count, size, *often) in enumerate(shards)
            ),
            rejected=tuple(entries.rejected),
            ignored=dict(sorted(entries.ignored.items())),
            multi_label=entries.multi_label,
            resize=dict(resize) if resize else None,
            jpeg=jpeg,
        ),
        listing,
    )


def _splits(
    given: Sequence[str | None],
    codes: np.ndarray[Any, np.dtype[np.int8]],
    keys: np.ndarray[Any, np.dtype[np.uint64]],
    fractions: Mapping[str, float] | None,
    source: str,
) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int8]]]:
    """Fractions divide what the source calls train, or all of it if it names no split; its other splits stay.

    `given` and `codes`: the splits that occur, and which of them each sample has.
    """
    own = [split or "train" for split in given]
    if fractions is not None:
        if taken := sorted((set(own) - {"train"}) & fractions.keys()):
            raise SourceError(
                f"source {source} has its own split {taken[0]!r}, and splits names it too; leave {taken[0]!r} out of"
                " splits (the fractions divide train), or leave splits out"
            )
        names = order_splits([*fractions, *(set(own) - {"train"})])
        of = np.array([names.index(name) if name != "train" else -1 for name in own], np.int8)[codes]
        parts = np.array([names.index(name) for name in fractions], np.int8)[assign_splits(keys, fractions)]
        numbers = np.where(of < 0, parts, of)
    else:
        names = order_splits(own)
        numbers = np.array([names.index(name) for name in own], np.int8)[codes]
    used = np.unique(numbers)
    if len(used) < len(names):
        empty = [name for number, name in enumerate(names) if number not in used]
        raise SourceError(f"split {empty[0]!r} would be empty: {len(keys):,} images are too few for splits={fractions}")
    return names, numbers


def _tar_order(entries: Entries, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Whole tars are permuted; inside a tar the order stays, so that each is read once from front to back."""
    tars, firsts, number = np.unique(np.frombuffer(entries.places, np.int32), return_index=True, return_inverse=True)
    keys = np.array([int(sample_key(entries.path[i].split(".tar/")[0]), 16) for i in firsts.tolist()], np.uint64)
    rank = np.empty(len(tars), np.int64)
    rank[permutation(keys, seed)] = np.arange(len(tars))
    return np.lexsort((np.frombuffer(entries.offset, np.int64), rank[number]))


def _digest(listing: Listing, head: Sequence[Any]) -> str:
    total = hashlib.sha256(canonical(head).encode())
    label = "labels" if listing.entries.multi_label else "label"
    for table in listing.shards():
        columns = [table[name].to_pylist() for name in ("path", "offset", "size", "etag", label)]
        total.update("".join(map("\n{}\0{}\0{}\0{}\0{}".format, *columns)).encode())
    return total.hexdigest()


def freeze(plan: Plan, listing: Listing) -> None:
    """Write the plan; nothing happens if it is there already, because its name is its content."""
    import pyarrow.parquet as pq

    head = store.join(plan.uri, "plan.json")
    if store.exists(head):
        return
    tables = listing.shards()
    with tempfile.TemporaryDirectory(prefix="vit-plan-") as folder:
        path = Path(folder) / "part.parquet"
        for part, first in enumerate(range(0, len(plan.shards), PART_SHARDS)):
            table = next(tables)
            with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
                writer.write_table(table, row_group_size=table.num_rows)
                for table in islice(tables, len(plan.shards[first + 1 : first + PART_SHARDS])):
                    writer.write_table(table, row_group_size=table.num_rows)
            store.upload(path, store.join(plan.uri, "listing", f"{part:06d}.parquet"))
    store.write_json(head, {"version": PLAN_VERSION, **dataclasses.asdict(plan)} | {"uri": None})


@lru_cache(maxsize=2)
def load_plan(uri: str) -> Plan:
    value = store.read_json(store.join(uri, "plan.json"))
    if value.pop("version") != PLAN_VERSION:
        raise CorpusError(f"{uri} was written by another release; run `vit shard` again")
    return Plan(
        **value
        | {
            "uri": uri,
            "class_names": tuple(value["class_names"]),
            "shards": tuple(PlannedShard(**shard) for shard in value["shards"]),
            "rejected": tuple(Rejected(**item) for item in value["rejected"]),
        }
    )
