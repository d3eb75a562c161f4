"""The shard stage on the real object store, Ray and MLflow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import shard, store
from pipelines.config import from_dict
from pipelines.corpus.errors import SourceError
from pipelines.corpus.manifest import open_corpus
from pipelines.shard import ShardRecipe, make_corpus

from .inputs import class_folders, picture


@pytest.mark.stack
def test_from_bucket_to_bucket_with_identity_and_tracking(tmp_path: Path, stack: Any) -> None:
    """On the real object store, Ray and MLflow: a second run returns the first, a new image makes a new version."""
    folder = class_folders(tmp_path / "s", {"train/cat": 25, "train/dog": 25, "val/cat": 5, "val/dog": 5})
    name = f"test-shard-{os.getpid()}-{time.time_ns()}"
    prefix = store.join(store.root(), "uploads", name)
    for path in sorted(folder.rglob("*.*")):
        store.upload(path, store.join(prefix, path.relative_to(folder).as_posix()))
    values = {"source": prefix, "destination": name, "shard_bytes": 2500}
    result = shard.run(from_dict(ShardRecipe, values))
    corpus = open_corpus(result.uri)
    assert corpus.splits == {"train": 50, "val": 10} and result.uri == open_corpus(f"{name}@current").reference
    assert result.metrics["images"] == 60 and not result.reused and result.run_id
    for row in corpus.samples("val").to_pylist():
        data = store.read(corpus.shard_uri(row["shard"]), row["offset"], row["bytes"])
        assert (folder / row["source"]).read_bytes() in data
    assert shard.run(from_dict(ShardRecipe, values)).reused
    here = {"source": str(folder), "destination": str(tmp_path / "c"), "shard_bytes": 2500, "num_workers": 0}
    local = make_corpus(from_dict(ShardRecipe, here))
    assert local.digest == corpus.digest  # The same images from a folder are the same corpus.

    store.write(store.join(prefix, "train/dog/extra.png"), picture(999))
    grown = shard.run(from_dict(ShardRecipe, values))
    assert not grown.reused and open_corpus(grown.uri).splits == {"train": 51, "val": 10}
    assert open_corpus(f"{name}@current").digest != corpus.digest and len(corpus.samples("train")) == 50


@pytest.mark.stack
def test_subset_mixture_and_growth_in_the_object_store(tmp_path: Path, stack: Any) -> None:
    from pipelines import mix, subset
    from pipelines.corpus.command import main
    from pipelines.mix import MixPart, MixRecipe
    from pipelines.subset import SubsetRecipe

    name = f"test-views-{os.getpid()}-{time.time_ns()}"
    folder = class_folders(tmp_path / "s", {"cat": 30, "dog": 30})
    values = {"source": str(folder), "destination": name, "shard_bytes": 6000, "num_workers": 0}
    first = shard.run(from_dict(ShardRecipe, values))
    (folder / "dog" / "extra.png").write_bytes(picture(999))
    grown = shard.run(from_dict(ShardRecipe, values | {"append": True}))
    assert open_corpus(grown.uri).head.parent == open_corpus(first.uri).digest
    assert open_corpus(grown.uri).splits == {"train": 61}
    half = subset.run(SubsetRecipe(corpus=grown.uri, destination=f"{name}-half", fraction=0.5))
    assert half.run_id and open_corpus(f"{name}-half@current").splits == {"train": 30}
    assert subset.run(SubsetRecipe(corpus=grown.uri, destination=f"{name}-half", fraction=0.5)).reused
    parts = {"all": MixPart(corpus=grown.uri, weight=1.0), "half": MixPart(corpus=half.uri, weight=1.0)}
    mixed = open_corpus(mix.run(MixRecipe(corpora=parts, destination=f"{name}-mix")).uri)
    assert mixed.splits["train"] in range(61 + 60, 61 + 63) and mixed.samples("train").num_rows == mixed.splits["train"]
    (tmp_path / "list.txt").write_text("dog/extra.png\n")
    assert main(["exclude", name, str(tmp_path / "list.txt")], lambda: None) == 0
    assert open_corpus(f"{name}@current").splits == {"train": 60}


@pytest.mark.stack
@pytest.mark.parametrize("source", ["s3://no-such-bucket-here/x", "ROOT/no-such-prefix"])
def test_a_wrong_bucket_or_prefix_is_said(source: str, stack: Any) -> None:
    with pytest.raises((SourceError, store.StoreError), match=r"does not exist|is empty|cannot list"):
        shard.run(from_dict(ShardRecipe, {"source": source.replace("ROOT", store.root()), "destination": "x"}))
