"""Each planted damage is found and named; a clean corpus is clean, whoever wrote its tars."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import store
from pipelines.cli import main
from pipelines.config import from_dict
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.corpus.small import write_corpus
from pipelines.index import adopt_tars
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.store import local
from pipelines.verify import Verdict, VerifyRecipe, verify

from .corpus.foreign import write_tars
from .corpus.inputs import class_folders, picture, png_header
from .test_index import named, recipe

IMAGES = [(("train", "val")[i % 4 == 3], "ab"[i % 2], f"{'ab'[i % 2]}/{i}.png", picture(i)) for i in range(40)]


def check(folder: Path, **settings: Any) -> Verdict:
    return verify(from_dict(VerifyRecipe, {"corpus": str(folder), "num_workers": 0} | settings))


@pytest.fixture(params=["sharded", "adopted"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 4)
    if request.param == "sharded":
        return write_corpus(tmp_path / "c", IMAGES, shard_samples=10)
    return adopt_tars(recipe(write_tars(tmp_path / "c", members=named))).corpus


def tar(corpus: Corpus, number: int = 0) -> Path:
    return Path(corpus.shard_uri(number))


def manifest(corpus: Corpus) -> Path:
    return Path(corpus.uri) / "manifests" / corpus.digest


@pytest.mark.parametrize("deep", [False, True])
def test_a_clean_corpus_is_clean(deep: bool, corpus: Corpus) -> None:
    verdict = check(Path(corpus.uri), deep=deep)
    assert verdict.findings == [] and verdict.counts == {}
    assert (verdict.samples, verdict.shards) == (corpus.head.samples, corpus.head.shards)
    assert verdict.bytes == corpus.head.bytes and verdict.written_again == 0


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "me@host", IMAGES[:4], shard_samples=10)
    assert check(tmp_path / "me@host").samples == 4
    assert verify(VerifyRecipe(corpus=corpus.reference, num_workers=0)).samples == 4


@pytest.fixture(params=["sharded", "adopted"])
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    """By the stages themselves, whose records know the ETags."""
    if request.param == "adopted":
        return adopt_tars(recipe(write_tars(tmp_path / "c", members=named))).corpus
    settings = {"source": str(class_folders(tmp_path / "s", {"a": 9, "b": 8})), "destination": str(tmp_path / "c")}
    return make_corpus(from_dict(ShardRecipe, {**settings, "shard_bytes": 3000, "num_workers": 0}))


def flip(corpus: Corpus) -> None:
    data = bytearray(tar(corpus).read_bytes())
    data[corpus.samples("train").to_pylist()[1]["offset"] + 560] ^= 1
    tar(corpus).write_bytes(data)


def test_a_tar_that_was_written_again_is_told_from_one_that_was_written_over_and_from_rot(recorded: Corpus) -> None:
    place = tar(recorded)
    times = place.stat().st_mtime_ns
    assert check(Path(recorded.uri)).written_again == 0
    place.write_bytes(place.read_bytes())
    os.utime(place, ns=(times + 1000, times + 1000))
    verdict = check(Path(recorded.uri))
    assert verdict.counts == {} and verdict.written_again == 1
    flip(recorded)
    os.utime(place, ns=(times + 1000, times + 1000))
    (over,) = [finding for finding in check(Path(recorded.uri)).findings if finding.kind == "sha256"]
    assert "it was written over" in over.detail
    os.utime(place, ns=(times, times))
    (rot,) = [finding for finding in check(Path(recorded.uri)).findings if finding.kind == "sha256"]
    assert "under its old ETag" in rot.detail


def test_a_version_of_shards_that_others_hold_knows_their_etags(recorded: Corpus) -> None:
    from pipelines.corpus.grow import exclude

    exclude(recorded.reference, [recorded.samples("train")["key"][0].as_py()])
    os.utime(tar(recorded, 1))
    verdict = check(Path(recorded.uri))
    assert verdict.counts == {} and verdict.written_again == 1


@pytest.mark.parametrize("grown", [False, True])
def test_the_manifest_is_read_once_however_many_tars_there_are(
    grown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.corpus.grow import exclude

    reads: list[Counter[str]] = []
    for count in (8, 24):
        corpus = write_corpus(tmp_path / str(count), IMAGES[:count], shard_samples=1)
        if grown:
            corpus = exclude(corpus.reference, [IMAGES[0][2]])
        seen: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            real = local.read

            def read(uri: str, *rest: Any, real: Any = real, seen: Counter[str] = seen) -> bytes:
                if "/manifests/" in uri:
                    seen[uri.rpartition("/")[2]] += 1
                return real(uri, *rest)

            patch.setattr(local, "read", read)
            assert check(Path(corpus.uri)).counts == {}
        reads.append(seen)
    assert reads[0] == reads[1]


def flip_image_byte(corpus: Corpus) -> None:
    row = corpus.samples("train").to_pylist()[2]
    data = bytearray(tar(corpus).read_bytes())
    image = data.find(b"IDAT", row["offset"])
    data[image + 20] ^= 1
    tar(corpus).write_bytes(data)


def flip_header_byte(corpus: Corpus) -> None:
    data = bytearray(tar(corpus).read_bytes())
    data[corpus.samples("train").to_pylist()[3]["offset"] + 2] ^= 1
    tar(corpus).write_bytes(data)


def truncate(corpus: Corpus) -> None:
    tar(corpus).write_bytes(tar(corpus).read_bytes()[:-5000])


def swap(corpus: Corpus) -> None:
    first, second = tar(corpus, 0).read_bytes(), tar(corpus, 1).read_bytes()
    tar(corpus, 0).write_bytes(second)
    tar(corpus, 1).write_bytes(first)


def extra(corpus: Corpus) -> None:
    shutil.copy(tar(corpus), tar(corpus).with_name("put-there.tar"))


def edit_head(corpus: Corpus, **values: Any) -> None:
    uri = str(manifest(corpus) / "head.json")
    store.write_json(uri, store.read_json(uri) | values)


def edit_table(path: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    values = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(at, column, values), path)


def edit_samples(column: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Corpus], None]:
    return lambda corpus: edit_table(next((manifest(corpus) / "samples").glob("*.parquet")), column, change)


def swap_first(values: list[Any]) -> list[Any]:
    other = next(i for i, value in enumerate(values) if value != values[0])
    values[0], values[other] = values[other], values[0]
    return values


DAMAGE: dict[str, tuple[Callable[[Corpus], object], set[str]]] = {
    "flipped byte of an image": (flip_image_byte, {"sha256", "content"}),
    "flipped byte of a header": (flip_header_byte, {"sha256", "tar"}),
    "truncated": (truncate, {"size", "sha256"}),
    "missing": (lambda corpus: tar(corpus).unlink(), {"missing"}),
    "extra": (extra, {"stray"}),
    "swapped": (swap, {"sha256"}),
    "classes renamed": (lambda corpus: edit_head(corpus, class_names=["x", "y", "z"]), {"manifest"}),
    "counts edited": (lambda corpus: edit_head(corpus, bytes=1), {"manifest"}),
    "splits edited": (lambda corpus: edit_head(corpus, splits=[["train", 1], ["val", 2]]), {"manifest"}),
    "rejected edited": (lambda corpus: edit_head(corpus, rejected={"bomb": 3}), {"manifest"}),
    "shard table": (
        lambda corpus: edit_table(manifest(corpus) / "shards.parquet", "samples", lambda v: [v[0] - 1, *v[1:]]),
        {"manifest"},
    ),
    "no shard table": (lambda corpus: (manifest(corpus) / "shards.parquet").unlink(), {"manifest"}),
    "no samples": (lambda corpus: shutil.rmtree(manifest(corpus) / "samples"), {"rows"}),
    "labels edited": (edit_samples("label", swap_first), {"label"}),
    "keys edited": (edit_samples("key", swap_first), {"key"}),
    "sizes edited": (edit_samples("width", lambda v: [9, *v[1:]]), {"image"}),
    "hashes edited": (edit_samples("content", swap_first), {"content"}),
    "offsets edited": (edit_samples("offset", lambda v: [v[0], v[1] + 512, *v[2:]]), {"pages"}),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_each_planted_damage_is_found_and_named(what: str, corpus: Corpus) -> None:
    damage, kinds = DAMAGE[what]
    damage(corpus)
    verdict = check(Path(corpus.uri))
    assert kinds <= verdict.counts.keys(), verdict.findings
    assert {finding.kind for finding in verdict.findings} == verdict.counts.keys()
    names = {finding.where for finding in verdict.findings}
    if what in ("flipped byte of an image", "missing", "truncated"):
        assert names == {corpus.shards[0].name}
    if what == "swapped":
        details = [finding.detail for finding in verdict.findings if finding.kind == "sha256"]
        assert details[0].endswith(f"these are the bytes of {corpus.shards[1].name}") and len(details) == 2
    if what == "extra":
        assert names == {"put-there.tar"}


def test_only_deep_sees_broken_pixels_behind_a_whole_header(tmp_path: Path) -> None:
    """As after `validate: header`."""
    images = [*IMAGES, ("train", "a", "a/odd.png", png_header(30, 20))]
    write_corpus(tmp_path / "c", images)
    assert check(tmp_path / "c").counts == {}
    assert check(tmp_path / "c", deep=True).counts == {"image": 1}


def test_tars_that_an_unfinished_run_planned_are_no_strays(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", IMAGES)
    digest = "ab" * 32
    shutil.copy(tar(corpus), tar(corpus).with_name(f"train-{digest[:12]}-000007.tar"))
    assert check(tmp_path / "c").counts == {"stray": 1}
    store.write_json(str(tmp_path / "c" / "plans" / digest / "plan.json"), {})
    verdict = check(tmp_path / "c")
    assert verdict.counts == {} and verdict.planned == 1


def test_tars_that_the_index_did_not_take_or_could_not_use_are_no_strays(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "t", members=named)
    first = sorted(source.rglob("*.tar"))[0]
    adopt_tars(recipe(first, destination=str(tmp_path / "one")))
    assert check(tmp_path / "one").counts == {}
    (source / "empty.tar").write_bytes(bytes(10240))
    assert adopt_tars(recipe(source, destination=str(tmp_path / "all"))).anomalies["no_sample"] == 1
    assert check(tmp_path / "all").counts == {}
    shutil.copy(first, source / "empty.tar")  # Now it holds something.
    shutil.copy(first, source / "late.tar")
    assert check(tmp_path / "all").counts == {"stray": 2}


def test_the_command_says_what_it_found_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "c", IMAGES, shard_samples=10)
    command = ["verify", str(tmp_path / "c"), "--num-workers", "0"]
    assert main(command) == 0
    assert "40 samples in 4 tars" in (said := capsys.readouterr().out) and "all as the manifest says" in said
    tar(corpus, 1).unlink()
    flip_image_byte(corpus)
    assert main([*command, "--deep"]) == 1
    said = capsys.readouterr().out
    assert "missing" in said and corpus.shards[1].name in said and "NOT as the manifest says" in said
    assert main(["verify", f"{tmp_path / 'c'}@{corpus.digest[:12]}", "--num-workers", "0"]) == 1
    assert main(["verify", str(tmp_path / "none"), "--num-workers", "0"]) == 1
    assert "no corpus" in capsys.readouterr().err
    assert main(["verify"]) == 2


@pytest.mark.stack
def test_a_corpus_in_a_bucket_is_verified_by_ray(tmp_path: Path, stack: Any) -> None:
    name = f"test-verify-{tmp_path.name}"
    corpus = write_corpus(name, IMAGES, shard_samples=10)
    verdict = verify(from_dict(VerifyRecipe, {"corpus": f"{name}@current", "deep": True}))
    assert verdict.counts == {} and verdict.samples == 40
    uri = corpus.shard_uri(1)
    store.write(uri, store.read(uri)[:-1024])
    assert verify(from_dict(VerifyRecipe, {"corpus": corpus.reference})).counts.keys() == {"size", "sha256"}
    assert open_corpus(corpus.reference).digest == corpus.digest
