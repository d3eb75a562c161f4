"""Makes one shard of a plan: fetch, check, write, upload, and last its record. Runs anywhere, any number of times."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pipelines import store
from pipelines.corpus.commit import ShardRecord, write_table
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.fetch import fetch
from pipelines.corpus.images import ImageFacts, ImageRejected, inspect_image
from pipelines.corpus.plan import Plan, load_plan
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.tar import ShardContent, ShardWriter, sample_key
from pipelines.corpus.tiled import tile_jpeg

__all__ = ["build_shard", "finished_record"]

log = logging.getLogger(__name__)
SPARE_BYTES = 64 << 20  # Disk that a node keeps free while a shard is put together.

DECODER_REASONS = {"too_many_bytes": "bomb", "too_many_pixels": "bomb", "unsupported_mode": "unsupported_format"}


def build_shard(plan_uri: str, number: int, *, keep: bool = True) -> tuple[ShardRecord, bool]:
    """The record of shard `number`, and whether it was made before (looked for if `keep`).

    Raises CorpusError, StoreError.
    """
    plan = load_plan(plan_uri)
    record = finished_record(plan, number) if keep else None
    if record is not None:
        return record, True
    shard = plan.shards[number]
    needed = 2 * shard.bytes + 4096 * shard.rows + SPARE_BYTES
    with tempfile.TemporaryDirectory(prefix="vit-shard-") as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CorpusError(
                f"{tempfile.gettempdir()} has {free >> 20:,} MB free, shard {shard.name} may need {needed >> 20:,} MB;"
                " free some, or set TMPDIR to a larger disk, and run the same command again"
            )
        path = Path(folder) / shard.name
        content, rejected, noted = _write(plan, number, path)
        etag = store.upload(path, store.join(plan.base, "shards", shard.name)) if content.rows.num_rows else ""
    rows = f"plans/{plan.digest}/shards/{number:06d}.parquet"
    write_table(store.join(plan.base, rows), content.rows)
    record = ShardRecord(
        number=number,
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
        rejected=rejected,
        noted=dict(sorted(noted.items())),
    )
    store.write_json(_record_uri(plan, number), record.to_json())
    return record, False


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


def _write(plan: Plan, number: int, path: Path) -> tuple[ShardContent, list[Rejected], Counter[str]]:
    rows = plan.rows(number)
    split = plan.shards[number].split
    check = _checks(plan)
    rejected: list[Rejected] = []
    noted: Counter[str] = Counter()
    with path.open("wb") as file, ShardWriter(file) as writer:
        for row, image in zip(rows, fetch(plan.kind, rows), strict=True):
            try:
                if isinstance(image, ImageRejected):
                    raise image
                facts = check(image)
            except ImageRejected as reason:
                # A rejected sample leaves a gap and shifts nothing: shards were cut by source bytes before.
                key = sample_key(row.path)
                rejected.append(Rejected(key, row.path, split, row.label, reason.reason, reason.detail))
                continue
            noted.update(facts.notes)
            if plan.kind != "idx" and not _named_as(row.path, facts.extension):
                noted["renamed"] += 1
            writer.add(
                path=row.path,
                image=tile_jpeg(image, facts) if plan.jpeg == "tiled" else image,
                extension=facts.extension,
                width=facts.width,
                height=facts.height,
                label=row.label,
            )
        return writer.close(), rejected, noted


def _named_as(path: str, extension: str) -> bool:
    named = path.lower().rpartition(".")[2]
    return ("jpg" if named == "jpeg" else named) == extension


def _checks(plan: Plan) -> Callable[[bytes], ImageFacts]:
    # Rows of an IDX file were made into PNG by us a moment ago: decoding them would check our own encoder.
    if plan.validate == "header" or plan.kind == "idx":
        return inspect_image
    return _inspect_and_decode


def _inspect_and_decode(image: bytes) -> ImageFacts:
    from vit_model.preprocess import ImageError, decode_image

    facts = inspect_image(image)
    try:
        decode_image(image, 3)
    except ImageError as error:
        raise ImageRejected(DECODER_REASONS.get(error.reason, "corrupt"), str(error)) from None
    return facts
