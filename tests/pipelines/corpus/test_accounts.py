"""What a run left out is never hidden by a version that stood already; a damaged manifest is made whole again."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines import index, mix, shard, subset
from pipelines.corpus.errors import ManifestError
from pipelines.corpus.grow import exclude
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.corpus.whole import lost_manifest
from pipelines.identity import StageResult
from pipelines.index import IndexRecipe, adopt_tars
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.show import ShowRecipe, make_report
from pipelines.subset import SubsetRecipe, make_subset
from pipelines.verify import VerifyRecipe, verify

from .inputs import class_folders, picture, tar_bytes


def recipe(source: Path, base: Path, **settings: Any) -> ShardRecipe:
    values: dict[str, Any] = {"source": str(source), "destination": str(base), "shard_bytes": 30_000, "num_workers": 0}
    return ShardRecipe(**(values | settings))


def left_out(corpus: Corpus) -> tuple[dict[str, int], dict[str, int], list[str]]:
    return corpus.head.rejected, corpus.head.ignored, corpus.quarantine()["source"].to_pylist()


def test_a_bad_file_that_appears_or_goes_is_told_though_the_version_stays(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"cat": 100, "dog": 100}), tmp_path / "c"
    clean = make_corpus(recipe(source, base))
    head = (base / "manifests" / clean.digest / "head.json").read_bytes()
    (source / "cat" / "bad.jpg").write_bytes(b"no image")
    (source / "cat" / ".hidden").write_bytes(b"x")
    dirty = make_corpus(recipe(source, base))
    assert dirty.digest == clean.digest and left_out(dirty) == ({"not_an_image": 1}, {"hidden": 1}, ["cat/bad.jpg"])
    assert dirty.head.bad_fraction == pytest.approx(1 / 201, abs=1e-6)
    assert open_corpus(f"{base}@current") == dirty == pickle.loads(pickle.dumps(dirty))
    assert (base / "manifests" / clean.digest / "head.json").read_bytes() == head
    assert left_out(open_corpus(clean.reference)) == left_out(clean) == ({}, {}, [])
    assert "no known image format" in make_report(ShowRecipe(corpus="", compared=0), dirty)[0]

    gone = exclude(f"{base}@current", ["cat/0000.png"])
    assert gone.head.rejected == {"not_an_image": 1, "withdrawn": 1}
    (source / "cat" / "bad.jpg").unlink()
    again = make_corpus(recipe(source, base))
    assert left_out(again) == ({"withdrawn": 1}, {"hidden": 1}, ["cat/0000.png"])
    assert open_corpus(f"{base}@current") == again
    assert make_corpus(recipe(source, base)) == again


def test_tars_of_a_run_that_made_a_version_which_stood_are_not_called_unfinished(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"cat": 100, "dog": 100}), tmp_path / "c"
    corpus = make_corpus(recipe(source, base))
    (source / "cat" / "bad.jpg").write_bytes(b"no image")
    make_corpus(recipe(source, base))
    verdict = verify(VerifyRecipe(corpus=str(base), num_workers=0))
    assert verdict.counts == {} and (verdict.planned, verdict.needless) == (0, corpus.head.shards)
    listed = corpus.shards[0].name.split("-")[1]
    next(path for path in base.glob("plans/*/shards/*.json") if listed not in str(path)).unlink()
    verdict = verify(VerifyRecipe(corpus=str(base), num_workers=0))
    assert (verdict.planned, verdict.needless) == (corpus.head.shards, 0)


def test_a_tar_of_bad_samples_alone_is_told_though_the_version_stays(tmp_path: Path) -> None:
    def tar(name: str, images: dict[str, bytes]) -> None:
        members = [
            pair
            for key, data in images.items()
            for pair in ((f"{key}.cls", b"%d" % (len(key) % 2)), (f"{key}.png", data))
        ]
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / name).write_bytes(tar_bytes(members))

    given = IndexRecipe(source=str(tmp_path / "t"), max_bad_fraction=0.2, num_workers=0)
    tar("a.tar", {f"{'x' * (i % 2)}{i:02d}": picture(i) for i in range(20)})
    clean = adopt_tars(given).corpus
    tar("bad.tar", {"x": b"nothing"})
    dirty = adopt_tars(given)
    assert dirty.corpus.digest == clean.digest and dirty.corpus.head.rejected == {"not_an_image": 1}
    assert dirty.anomalies == {"no_sample": 1} and dirty.corpus.quarantine().num_rows == 1
    assert "no_sample" in make_report(ShowRecipe(corpus="", compared=0), dirty.corpus)[0]
    (tmp_path / "t" / "bad.tar").unlink()
    assert adopt_tars(given).corpus == clean == open_corpus(f"{tmp_path / 't'}@current")


def test_a_stage_that_is_reused_gives_its_own_account_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    source, base = class_folders(tmp_path / "s", {"cat": 100, "dog": 100}), tmp_path / "c"
    results = [shard.run(recipe(source, base))]
    (source / "cat" / "bad.jpg").write_bytes(b"no image")
    results.append(shard.run(recipe(source, base)))
    assert [one.details["rejected"] for one in results] == [{}, {"not_an_image": 1}]
    assert [one.metrics["rejected"] for one in results] == [0, 1] and results[0].uri == results[1].uri
    (source / "cat" / "bad.jpg").unlink()
    assert shard.run(recipe(source, base)).reused and open_corpus(f"{base}@current").head.rejected == {}


def test_current_is_what_the_last_subset_or_mixture_asked_for_also_if_it_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    corpus = make_corpus(recipe(class_folders(tmp_path / "s", {"cat": 20, "dog": 20}), tmp_path / "c"))
    values: dict[str, Any] = {"destination": str(tmp_path / "d"), "materialise": "never"}
    half = SubsetRecipe(corpus=corpus.reference, fraction=0.5, **values)
    part = mix.MixPart(corpus=corpus.reference)
    both = mix.MixRecipe(corpora={"one": part, "two": part}, **values)
    for run in [partial(subset.run, half), partial(mix.run, both)] * 2:
        result = run()
        assert open_corpus(f"{tmp_path / 'd'}@current").reference == result.uri
    assert result.reused


def test_a_subset_that_takes_everything_leaves_the_account_of_its_corpus(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"cat": 100, "dog": 100}), tmp_path / "c"
    (source / "cat" / "bad.jpg").write_bytes(b"no image")
    corpus = make_corpus(recipe(source, base))
    made = make_subset(SubsetRecipe(corpus=corpus.reference, destination=str(base), fraction=1.0), corpus)
    assert made == corpus == open_corpus(f"{base}@current") and made.samples("train").num_rows == 200


# Damage -------------------------------------------------------------------------------------------------------------


def empty(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        next(folder.glob(name)).write_bytes(b"")

    return spoil


def flip(folder: Path) -> None:
    path = next(folder.glob("samples/*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "shards": empty("shards.parquet"),
    "no shards": lambda folder: (folder / "shards.parquet").unlink(),
    "samples": empty("samples/*.parquet"),
    "no samples": lambda folder: shutil.rmtree(folder / "samples"),
    "no quarantine": lambda folder: (folder / "quarantine.parquet").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("adopted", [False, True])
def test_the_same_command_makes_a_damaged_manifest_whole(adopted: bool, damage: str, tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"cat": 9, "dog": 9}), tmp_path / "c"
    tars = IndexRecipe(source=str(tmp_path / "made" / "shards"), destination=str(base), num_workers=0)
    if adopted:
        make_corpus(recipe(source, tmp_path / "made"))

    def make() -> Corpus:
        return adopt_tars(tars).corpus if adopted else make_corpus(recipe(source, base))

    corpus = make()
    folder = Path(corpus.manifest)
    result = StageResult("shard", corpus.reference, "", None, {})
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    DAMAGES[damage](folder)
    assert lost_manifest(result) is not None
    with pytest.raises(ManifestError, match=r"is missing|is damaged"):
        spoiled = open_corpus(corpus.reference)
        spoiled.layout, spoiled.samples("train"), spoiled.quarantine()
    assert make() == corpus and lost_manifest(result) is None
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_rows_that_were_damaged_inside_are_written_anew_when_the_work_is_done_again(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"cat": 9, "dog": 9}), tmp_path / "c"
    corpus = make_corpus(recipe(source, base))
    rows = corpus.samples("train")
    flip(base / "manifests" / corpus.digest)
    assert make_corpus(recipe(source, base)).samples("train") == rows


def test_a_finished_stage_is_not_reused_without_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    corpus = make_corpus(recipe(class_folders(tmp_path / "s", {"cat": 9, "dog": 9}), tmp_path / "c"))
    half = SubsetRecipe(corpus=corpus.reference, destination=str(tmp_path / "half"), fraction=0.5)
    tars = IndexRecipe(source=str(tmp_path / "c" / "shards"), destination=str(tmp_path / "tars"), num_workers=0)
    for run in (
        partial(subset.run, half),
        partial(index.run, tars),
        partial(shard.run, recipe(tmp_path / "s", tmp_path / "d")),
    ):
        made = open_corpus(run().uri)
        rows = made.samples("train")
        assert run().reused
        Path(made.manifest, "shards.parquet").write_bytes(b"")
        assert not run().reused and open_corpus(made.reference).samples("train") == rows
