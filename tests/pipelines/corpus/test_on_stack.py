"""The shard stage on the real object store, Ray and MLflow."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines import shard, store
from pipelines.config import from_dict, load_recipe
from pipelines.corpus import build as build_module
from pipelines.corpus.errors import ManifestError, SourceError
from pipelines.corpus.manifest import open_corpus
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.tracking.client import TrackingError
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
@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_mlflow_nothing_is_committed_and_the_same_command_goes_on(
    num_workers: int, tmp_path: Path, stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = class_folders(tmp_path / "s", {"cat": 25, "dog": 25})
    values = {"source": str(folder), "destination": str(tmp_path / "c"), "shard_bytes": 2500}
    recipe = from_dict(ShardRecipe, values | {"num_workers": num_workers})
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 does not answer"):
            shard.run(recipe)
    assert not (tmp_path / "c" / "current.json").exists()
    result = shard.run(recipe)
    assert open_corpus(result.uri).splits == {"train": 50} and result.run_id and not result.reused


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


@pytest.mark.stack
def test_killed_on_ray_at_a_random_moment_the_same_command_ends_with_the_same_corpus(
    tmp_path: Path, stack: Any, record_property: Any
) -> None:
    """SIGKILL of the driver while Ray tasks write shards; they may go on for a moment, beside the second command."""
    folder = class_folders(tmp_path / "s", {"cat": 150, "dog": 150})
    name = f"test-kill-{os.getpid()}-{time.time_ns()}"
    values: dict[str, Any] = {"source": str(folder), "destination": name, "shard_bytes": 3000}
    flags = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "pipelines", "shard", "shard/class_folders", *flags]
    base = store.join(store.root(), "corpora", name)
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list(store.list_objects(store.join(base, "plans"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    after = random.uniform(0.0, 6.0)  # The whole run takes about as long from here.
    record_property("killed_after_seconds", after)
    time.sleep(after)
    first.kill()
    first.communicate()
    if not store.exists(store.join(base, "current.json")):
        with pytest.raises(ManifestError):
            open_corpus(f"{name}@current")
    second = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, f"killed after {after:.2f} s: {second.stdout}{second.stderr}"
    corpus = open_corpus(f"{name}@current")
    here = {**values, "destination": str(tmp_path / "whole"), "num_workers": 0}
    whole = make_corpus(load_recipe(ShardRecipe, "shard/class_folders", here))
    assert corpus.digest == whole.digest, f"killed after {after:.2f} s"
    tars = {item.uri.rsplit("/", 1)[1]: item.size for item in store.list_objects(store.join(base, "shards"))}
    assert tars == {Path(corpus.shard_uri(i)).name: one.bytes for i, one in enumerate(corpus.shards)}
    assert shard.run(load_recipe(ShardRecipe, "shard/class_folders", values)).reused
