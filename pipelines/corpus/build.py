"""Makes one shard of a plan: fetch, check, write, upload, and last its record. Runs anywhere, any number of times."""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipelines import store
from pipelines.corpus.checks import check_image, is_named_as, rejected_by
from pipelines.corpus.commit import ShardRecord
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.fetch import Planned, fetch
from pipelines.corpus.images import ImageFacts, ImageRejected
from pipelines.corpus.plan import Plan, load_plan
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.resize import ResizeConfig, shrink
from pipelines.corpus.tables import write_table
from pipelines.corpus.tar import ShardContent, ShardWriter, sample_key
from pipelines.corpus.tiled import tile_jpeg

__all__ = ["Made", "begin_shard", "finished_numbers", "finished_record", "make_shard", "store_shard"]

log = logging.getLogger(__name__)
IN_MEMORY = 512 << 20  # Source bytes of a shard; a larger one is put together on disk.
SPARE_BYTES = 64 << 20  # Disk that a node keeps free meanwhile.
OURS = frozenset({"idx"})  # Made into PNG by us a moment ago.
NAMED = frozenset({"idx", "corpus"})  # The path says nothing of the format, or did so when that corpus was made.


@dataclass(frozen=True, slots=True)
class Made:
    """A shard that is put together and not stored yet."""

    plan: Plan
    number: int
    content: ShardContent
    rejected: list[Rejected]
    noted: Counter[str]
    data: bytes | Path


def begin_shard(plan_uri: str, number: int, *, keep: bool = True) -> ShardRecord | Callable[[], ShardRecord]:
    """The record of a shard that was made before (looked for if `keep`), else a shard put together: call to store it.

    Raises CorpusError, StoreError.
    """
    plan = load_plan(plan_uri)
    record = finished_record(plan, number) if keep else None
    if record is not None:
        return record
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vit-shard-"))
        made = make_shard(plan, number, Path(folder))
        kept = stack.pop_all()

    def finish() -> ShardRecord:
        with kept:
            return store_shard(made)

    return finish


def make_shard(plan: Plan, number: int, folder: Path) -> Made:
    """Fetch, check and put together. Only a shard that is too large for memory goes through `folder`."""
    shard = plan.shards[number]
    if shard.bytes <= IN_MEMORY:
        sink = io.BytesIO()
        content, rejected, noted = _write(plan, number, sink)
        return Made(plan, number, content, rejected, noted, sink.getvalue())
    needed = 2 * shard.bytes + 4096 * shard.rows + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CorpusError(
            f"{tempfile.gettempdir()} has {free >> 20:,} MB free, shard {shard.name} may need {needed >> 20:,} MB;"
            " free some, or set TMPDIR to a larger disk, and run the same command again"
        )
    path = folder / shard.name
    with path.open("wb") as file:
        content, rejected, noted = _write(plan, number, file)
    return Made(plan, number, content, rejected, noted, path)


def store_shard(made: Made) -> ShardRecord:
    """The tar, then its rows, then the record that says that both are there."""
    plan, content, shard = made.plan, made.content, made.plan.shards[made.number]
    uri = store.join(plan.base, "shards", shard.name)
    etag = ""
    if content.rows.num_rows:
        etag = (
            store.upload(made.data, uri)
            if isinstance(made.data, Path)
            else store.write(uri, made.data, sha256=content.sha256)
        )
    rows = f"plans/{plan.digest}/shards/{made.number:06d}.parquet"
    write_table(store.join(plan.base, rows), content.rows)
    record = ShardRecord(
        number=made.number,
        split=shard.split,
        name=shard.name,
        bytes=content.bytes,
        samples=content.rows.num_rows,
        sha256=content.sha256,
        etag=etag,
        page_offset=content.page_offset,
        page_length=content.page_length,
        page_rows=content.page_rows,
        rows=rows,
        rejected=made.rejected,
        noted=dict(sorted(made.noted.items())),
        times=shard.times,
    )
    store.write_json(_record_uri(plan, made.number), record.to_json())
    return record


def finished_numbers(plan: Plan) -> frozenset[int]:
    """Shards that left a record; whether their tars still stand is seen shard by shard."""
    found = (info.uri.rpartition("/")[2] for info in store.list_objects(store.join(plan.uri, "shards")))
    return frozenset(int(name.removesuffix(".json")) for name in found if name.endswith(".json"))


def finished_record(plan: Plan, number: int) -> ShardRecord | None:
    """The record of a shard whose tar still stands as it was written."""
    try:
        record = ShardRecord.from_json(store.read_json(_record_uri(plan, number)))
        if record.samples:
            info = store.stat(store.join(plan.base, "shards", record.name))
            if (info.size, info.etag) != (record.bytes, record.etag):
                log.warning("%s is not what was written; it is made again", info.uri)
                return None
        return record if store.exists(store.join(plan.base, record.rows)) else None
    except store.NotFound:
        return None


def _record_uri(plan: Plan, number: int) -> str:
    return store.join(plan.uri, "shards", f"{number:06d}.json")


def _write(plan: Plan, number: int, file: BinaryIO) -> tuple[ShardContent, list[Rejected], Counter[str]]:
    rows = plan.rows(number)
    split = plan.shards[number].split
    resize = ResizeConfig(**plan.resize) if plan.resize else None
    rejected: list[Rejected] = []
    noted: Counter[str] = Counter()
    writer = ShardWriter(file, multi_label=plan.multi_label)
    for row, image in zip(rows, fetch(plan.kind, rows), strict=True):
        try:
            data, facts = _checked(plan, image, resize)
        except ImageRejected as reason:
            key = sample_key(row.path)
            rejected.append(Rejected(key, row.path, split, _first_label(row), reason.reason, reason.detail))
            continue
        noted.update(facts.notes)
        if plan.kind not in NAMED and "resized" not in facts.notes and not is_named_as(row.path, facts.extension):
            noted["renamed"] += 1
        writer.add(
            path=row.path,
            image=tile_jpeg(data, facts) if plan.jpeg == "tiled" else data,
            extension=facts.extension,
            width=facts.width,
            height=facts.height,
            label=row.label if row.labels is None else row.labels,
        )
    return writer.close(), rejected, noted


def _checked(plan: Plan, image: bytes | ImageRejected, resize: ResizeConfig | None) -> tuple[bytes, ImageFacts]:
    if isinstance(image, ImageRejected):
        raise image
    facts = check_image(image, decode=plan.validate == "decode" and plan.kind not in OURS)
    if resize is None:
        return image, facts
    with rejected_by():
        return shrink(image, facts, resize)


def _first_label(row: Planned) -> int:
    return row.labels[0] if row.labels else row.label
