"""The shard stage on the real object store, Ray and MLflow."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines import shard, store
from pipelines.config import from_dict
from pipelines.corpus import build as build_module
from pipelines.corpus.errors import SourceError
from pipelines.corpus.manifest import open_corpus
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.workflow.planning import plan
from tests.pipelines.tracking.toys import attempt, own_root

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
@pytest.mark.parametrize("source", ["s3://no-such-bucket-here/x", "ROOT/no-such-prefix"])
def test_a_wrong_bucket_or_prefix_is_said(source: str, stack: Any) -> None:
    with pytest.raises((SourceError, store.StoreError), match=r"does not exist|is empty|cannot list"):
        shard.run(from_dict(ShardRecipe, {"source": source.replace("ROOT", store.root()), "destination": "x"}))


@pytest.mark.stack
def test_current_is_what_was_asked_for_last_and_a_corpus_that_lost_a_tar_is_made_again(
    tmp_path: Path, stack: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_root(monkeypatch)
    folder = class_folders(tmp_path / "s", {"train/cat": 12, "train/dog": 12})
    values = {"source": str(folder), "destination": "two", "shard_bytes": 2500, "num_workers": 0}
    a, b = (from_dict(ShardRecipe, {**values, "seed": seed}) for seed in (1, 2))
    first, second = shard.run(a), shard.run(b)
    assert open_corpus("two@current").reference == second.uri != first.uri
    capsys.readouterr()
    assert shard.run(a).reused
    assert open_corpus("two@current").reference == first.uri
    now, before = (result.uri.rpartition("@")[2][:12] for result in (first, second))
    assert f"shard: current is {now} again, it was {before}" in capsys.readouterr().out
    assert shard.run(a).reused and "current is" not in capsys.readouterr().out

    corpus = open_corpus(first.uri)
    lost = corpus.shard_uri(len(corpus.shards) - 1)
    store.delete(lost)
    planned = plan("shard", a)
    assert planned.state == "lost" and planned.problem == f"{lost} of the corpus is gone"
    mended = shard.run(a)
    assert not mended.reused and mended.uri == first.uri and store.exists(lost)
    assert "it is made again" in capsys.readouterr().out
    assert shard.run(a).reused


def test_an_again_that_is_resumed_keeps_the_shards_it_has_made_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))
    folder = class_folders(tmp_path / "s", {"train/cat": 12, "train/dog": 12})
    values = {"source": str(folder), "destination": str(tmp_path / "c"), "shard_bytes": 2500, "num_workers": 0}
    made: list[int] = []

    def build(first: int, number: int) -> list[int]:
        made.clear()
        forget = partial(shard._forget, attempt("a" * 64, number, "shard", first))
        make_corpus(from_dict(ShardRecipe, values), before_build=forget)
        return list(made)

    written = build_module._write

    def watched(plan: Any, number: int, path: Path) -> Any:
        if number == interrupted_at:
            raise KeyboardInterrupt
        made.append(number)
        return written(plan, number, path)

    monkeypatch.setattr(build_module, "_write", watched)
    interrupted_at = -1
    everything = build(1, 1)
    assert len(everything) > 2 and build(1, 2) == []
    interrupted_at = 1
    with pytest.raises(KeyboardInterrupt):
        build(3, 3)
    assert made == [0]
    interrupted_at = -1
    assert build(3, 4) == everything[1:]
