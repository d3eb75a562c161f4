"""Stage `predict`: a model over a folder, a bucket prefix or a corpus -> Parquet, one row per image, none left out.

Ray Data decodes on any CPU of the cluster; actors hold the model. Rows come in the order of the listing and are written
in parts of a fixed size, so that a run that was killed goes on after its last whole part.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity, store
from pipelines.config import Strict, how, input_
from pipelines.identity import Attempt, StageResult
from pipelines.progress import progress, say

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.tracking.weights import ModelSource
    from vit_model import InputSpec

__all__ = ["STAGE", "VERSION", "PredictRecipe", "run"]

STAGE = "predict"
VERSION = 1
log = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
BLOCK_BYTES = 32 << 20  # Pixels of one Ray block.
BLOCK_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictRecipe(Strict):
    """A model over images -> a Parquet folder of classes and probabilities."""

    model: str = input_()  # models:/NAME@champion, models:/NAME/VERSION, or the URI of safetensors weights
    images: str = input_()  # Folder, s3:// prefix, one file, or a corpus as NAME@current
    split: str | None = None  # Of the corpus; null for a folder
    destination: str | None = None  # Folder or s3:// prefix for the Parquet files; null: beside the run
    batch_size: int = how(default=256)
    num_workers: int | None = how(default=None)  # Processes that hold the model; null: by the cluster; 0: no Ray
    device: Literal["auto", "cpu", "cuda"] = how(default="auto")

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_workers is not None and self.num_workers < 0):
            raise ValueError(f"batch_size={self.batch_size}, num_workers={self.num_workers}: at least 1 and 0")
        if is_corpus(self.images) and self.split is None:
            raise ValueError(f"images={self.images!r} is a corpus: say which split, such as split: test")
        if not is_corpus(self.images) and self.split is not None:
            raise ValueError(
                f"split={self.split!r} has no effect on a folder; name a corpus as NAME@current, or drop it"
            )


def is_corpus(images: str) -> bool:
    """NAME@VERSION; a folder that exists is a folder whatever its name."""
    return "@" in images.rsplit("/", 1)[-1] and (store.is_s3(images) or not Path(images).exists())


@dataclass(frozen=True, slots=True)
class Listing:
    """What is predicted, in order. `name` is what the rows call an image; the rest says where its bytes are."""

    digest: str
    names: list[str]
    uris: list[str]
    offsets: list[int] = field(default_factory=list)  # Of a corpus sample in its tar; empty for files.
    lengths: list[int] = field(default_factory=list)
    num_ignored: int = 0  # Files of the folder that are no images by their ending.

    def __len__(self) -> int:
        return len(self.names)

    def table(self, start: int, stop: int) -> pa.Table:
        import pyarrow as pa

        nothing = [None] * (stop - start)
        return pa.table(
            {
                # A file name may be no UTF-8: shown with replacements, opened by its bytes.
                "name": [_as_bytes(name).decode("utf-8", "replace") for name in self.names[start:stop]],
                "uri": [_as_bytes(uri) for uri in self.uris[start:stop]],
                "offset": pa.array(self.offsets[start:stop] or nothing, pa.int64()),
                "length": pa.array(self.lengths[start:stop] or nothing, pa.int64()),
            }
        )


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def run(recipe: PredictRecipe) -> StageResult:
    from pipelines.tracking.weights import find_weights

    source = find_weights(recipe.model)  # An alias is resolved here, once; the result names the version.
    listing = list_corpus(recipe.images, str(recipe.split)) if recipe.split else list_folder(recipe.images)
    inputs = {**source.inputs(), "images": listing.digest}
    return identity.run_stage(STAGE, VERSION, recipe, inputs, partial(_work, recipe, source, listing), _lost)


def _lost(result: StageResult) -> str | None:
    """The first file below the output stands for all of them."""
    return None if next(store.list_objects(result.uri), None) else f"its output {result.uri} is gone"


# What there is ------------------------------------------------------------------------------------------------------


def list_folder(images: str) -> Listing:
    """Image files below a folder or prefix by their ending, hidden ones left out; or one file."""
    base = images.rstrip("/") if store.is_s3(images) else str(Path(images).expanduser().absolute())
    if not store.is_s3(base) and not Path(base).exists():
        raise ValueError(f"images={images!r}: there is no {base}; a bucket is written s3://BUCKET/PREFIX")
    found = list(store.list_objects(base))
    if not found and not Path(base).is_dir() and store.exists(base):
        found = [store.stat(base)]
    names, uris, ignored = [], [], 0
    digest = hashlib.sha256()
    for info in found:
        name = info.uri.removeprefix(base).lstrip("/") or base.rsplit("/", 1)[-1]
        if any(part.startswith((".", "_")) for part in name.split("/")) or not name.lower().endswith(IMAGES):
            ignored += 1
            continue
        names.append(name)
        uris.append(info.uri)
        # Without the inode of a local file: a copy that keeps its times is the same image.
        mark = info.etag if store.is_s3(info.uri) else info.etag.rpartition("-")[0]
        digest.update(_as_bytes(f"{name}\0{info.size}\0{mark}\n"))
    if not names:
        also = f" ({ignored:,} other files)" if ignored else ""
        raise ValueError(f"no image in {base}{also}; files ending in {', '.join(IMAGES)} are taken")
    if ignored:
        say(f"{base}: {ignored:,} files are no images by their ending and are left out")
    return Listing(digest.hexdigest(), names, uris, num_ignored=ignored)


def list_corpus(reference: str, split: str) -> Listing:
    from pipelines.corpus.manifest import open_corpus

    corpus = open_corpus(reference)
    samples = corpus.samples(split)
    uris = [corpus.shard_uri(shard) for shard in range(len(corpus.shards))]
    return Listing(
        identity.canonical([corpus.digest, split]),
        [f"{source or key}" for source, key in zip(*(samples[c].to_pylist() for c in ("source", "key")), strict=True)],
        [uris[shard] for shard in samples["shard"].to_pylist()],
        samples["offset"].to_pylist(),
        samples["bytes"].to_pylist(),
    )


# The work -----------------------------------------------------------------------------------------------------------


def _work(recipe: PredictRecipe, source: ModelSource, listing: Listing, attempt: Attempt) -> StageResult:
    from pipelines.evaluation.parts import Parts, claim_destination
    from pipelines.tracking.run import track

    if recipe.destination is not None:
        claim_destination(recipe.destination, attempt.digest)  # Now: not after hours of work.
    with track(attempt, recipe, tags={"vit.model": source.uri, "vit.images": recipe.images}) as run:
        started = time.monotonic()
        parts = Parts(attempt, len(listing))
        begin = parts.num_rows
        if begin:
            say(f"{begin:,} of {len(listing):,} images were predicted by an earlier attempt")
        with progress("predict", len(listing), "images") as bar:
            for table in _answers(recipe, source, listing, begin):
                parts.add(table)
                seconds = time.monotonic() - started
                bar.update(parts.num_rows, images_per_second=(parts.num_rows - begin) / seconds)
            parts.close()
        seconds = time.monotonic() - started
        uri = parts.folder
        if recipe.destination is not None:
            uri = parts.publish(recipe.destination)
        metrics = {"num_images": float(parts.num_rows), "num_unreadable": float(parts.num_unreadable)}
        if parts.num_rows > begin:
            metrics["images_per_second"] = (parts.num_rows - begin) / seconds
        run.log_metrics(metrics, step=0)
        if parts.num_unreadable:
            say(f"{parts.num_unreadable:,} of {parts.num_rows:,} images could not be read; the column `error` says why")
        return attempt.result(
            uri=uri,
            run_id=run.id,
            metrics=metrics,
            model=source.uri,
            images=recipe.images,
            num_images=parts.num_rows,
            num_unreadable=parts.num_unreadable,
            num_ignored=listing.num_ignored,
        )


def _answers(recipe: PredictRecipe, source: ModelSource, listing: Listing, begin: int) -> Iterator[pa.Table]:
    """Tables of rows in the order of the listing, from row `begin`."""
    if begin >= len(listing):
        return
    spec = _spec_of(source)
    rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // (spec.channels * spec.height * spec.width)))
    blocks = [listing.table(at, min(at + rows, len(listing))) for at in range(begin, len(listing), rows)]
    if recipe.num_workers == 0:
        model = Model(source, recipe.device)
        for block in blocks:
            yield model(read_block(block, spec))
        return
    yield from _with_ray(recipe, source, spec, blocks)


def _with_ray(
    recipe: PredictRecipe, source: ModelSource, spec: InputSpec, blocks: list[pa.Table]
) -> Iterator[pa.Table]:
    import os

    import ray

    from pipelines.evaluation.placement import place

    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="WARNING")
    cpus, gpus = (float(ray.cluster_resources().get(name, 0.0)) for name in ("CPU", "GPU"))
    # The embedded head is one machine; any other cluster may still grow.
    placed = place(recipe.device, recipe.num_workers, cpus, gpus, can_grow="VIT_STATE" not in os.environ)
    if placed.waits:
        say(f"predict: waiting for {placed}; the cluster shows {cpus:g} CPUs and {gpus:g} GPUs (`ray status`)")
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow(blocks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = 2 * BLOCK_BYTES
    read = dataset.map_batches(
        read_block, fn_args=(spec,), batch_size=None, batch_format="pyarrow", num_cpus=placed.cpus
    )
    answered = read.map_batches(
        Model,
        fn_constructor_args=(source, "cuda" if placed.use_gpu else "cpu"),
        batch_size=recipe.batch_size,
        batch_format="pyarrow",
        num_cpus=placed.cpus,
        num_gpus=1 if placed.use_gpu else 0,
        concurrency=placed.count,
    )
    yield from answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def _spec_of(source: ModelSource) -> InputSpec:
    from pipelines.evaluate import specs_of
    from pipelines.tracking.weights import fetch_weights

    with tempfile.TemporaryDirectory(prefix="vit-predict-") as folder:
        return specs_of(fetch_weights(source, Path(folder)), source.uri)[0]


class Model:
    """Holds the model in a Ray actor, or in this process."""

    def __init__(self, source: ModelSource, device: str) -> None:
        import torch

        from pipelines.evaluate import choose_device
        from pipelines.evaluation.inference import Classifier
        from pipelines.tracking.weights import fetch_weights

        with tempfile.TemporaryDirectory(prefix="vit-predict-") as folder:
            self._classifier = Classifier(fetch_weights(source, Path(folder)), choose_device(device))
        if device == "cpu":
            torch.set_num_threads(1)  # One CPU is what the actor asked for.

    def __call__(self, block: pa.Table) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from pipelines.evaluation.parts import row_schema

        spec = self._classifier.spec
        pixels = block["image"].combine_chunks()
        size = pixels.type.byte_width
        flat = np.frombuffer(pixels.buffers()[1], np.uint8, count=len(block) * size, offset=pixels.offset * size)
        images = flat.reshape(len(block), spec.channels, spec.height, spec.width)
        errors = block["error"].to_pylist()
        columns = self._classifier.answer(images, np.array([not error for error in errors]))
        return pa.table(
            {"path": block["name"], **columns, "error": [error or None for error in errors]}, schema=row_schema()
        )


def read_block(block: pa.Table, spec: InputSpec) -> pa.Table:
    """Fetch and decode; runs in a Ray task. A missing or unreadable image is an error in its row."""
    import numpy as np
    import pyarrow as pa

    from pipelines.evaluation.inference import decode

    images = np.zeros((len(block), spec.channels, spec.height, spec.width), np.uint8)
    errors = []
    for place, row in enumerate(block.to_pylist()):
        try:
            data = _bytes_of(row)
        except (store.NotFound, store.Unreadable, ValueError) as error:
            errors.append(f"missing: {error}")
            continue
        errors.append(decode(data, spec, images[place]))
    flat = images.reshape(len(block), -1)
    pixels = pa.Array.from_buffers(pa.binary(flat.shape[1]), len(block), [None, pa.py_buffer(flat)])
    return pa.table({"name": block["name"], "image": pixels, "error": errors})


def _bytes_of(row: dict[str, Any]) -> bytes:
    uri = row["uri"].decode("utf-8", "surrogateescape")
    if row["offset"] is None:
        return store.read(uri)
    from pipelines.reader.tar import walk

    data = memoryview(store.read(uri, row["offset"], row["length"]))
    samples, problem = walk(data)
    for extension, (start, length) in (samples[0].members if samples else {}).items():
        if f".{extension}" in IMAGES:
            return bytes(data[start : start + length])
    raise ValueError(f"{uri}, byte {row['offset']:,}: {problem or 'the sample has no image'}")
