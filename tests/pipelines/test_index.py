"""Tars that others wrote become a corpus in place: read back by the reader, every oddity named, nothing touched."""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import index, store
from pipelines.config import RecipeError, from_dict, load_recipe, parse
from pipelines.corpus.errors import ManifestError, QuarantineError, SourceError
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.identity import digest_of
from pipelines.index import Adopted, IndexRecipe, adopt_tars
from pipelines.reader.loader import AugmentConfig, ReaderConfig, eval_batches, train_batches
from pipelines.reader.tar import walk
from vit_model.preprocess import InputSpec, load_image

from .corpus.foreign import Member, foreign_tar, sample, special, write_tars
from .corpus.inputs import picture, png_header, tar_bytes

SPEC = InputSpec(channels=3, height=8, width=8)
LOCAL = ReaderConfig(backend="local", max_bad_fraction=0.0, on_bad="fail")


def recipe(source: Path | str, **settings: Any) -> IndexRecipe:
    return from_dict(IndexRecipe, {"source": str(source), "num_workers": 0} | settings)


def adopt(source: Path, **settings: Any) -> Adopted:
    return adopt_tars(recipe(source, **settings))


def one_tar(folder: Path, members: list[Member], **settings: Any) -> Adopted:
    """Index a tar of these members between clean samples of three classes."""
    folder.mkdir(exist_ok=True)
    clean = [part for i in range(3) for part in sample(f"clean{i}", i)]
    last = [part for i in range(3, 6) for part in sample(f"clean{i}", i)]
    (folder / "x.tar").write_bytes(foreign_tar(clean + members + last, **settings))
    return adopt(folder, max_bad_fraction=1.0)


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*.tar")
    }


def read_all(corpus: Corpus, split: str) -> list[tuple[int, int, bytes]]:
    """(sample id, label, pixels) as evaluation sees them; a bad sample raises."""
    with eval_batches(corpus, split=split, batch_size=4, spec=SPEC, reader=LOCAL) as batches:
        return [
            (int(i), int(label), image.numpy().tobytes())
            for batch in batches
            for i, label, weight, image in zip(batch.sample_ids, batch.labels, batch.weights, batch.images, strict=True)
            if weight
        ]


def named(key: str, number: int) -> list[Member]:
    """The class by name, in .cls of even samples and in .json of odd ones."""
    name = ("cat", "dog", "\u00fcber-<owl>")[number % 3]
    label = (f"{key}.cls", f"{name}\n".encode()) if number % 2 == 0 else (f"{key}.json", json.dumps({"label": name}))
    return [
        (f"{key}.png", picture(number, kind="PNG")),
        (label[0], label[1].encode() if isinstance(label[1], str) else label[1]),
    ]


def in_json(key: str, number: int) -> list[Member]:
    return [(f"{key}.json", json.dumps({"label": number % 3}).encode()), (f"{key}.webp", picture(number, kind="WEBP"))]


def in_folders(key: str, number: int) -> list[Member]:
    return sample(f"{'a-long-folder-name/' * 9}{number % 4}/{key}", number, kind="PNG")


STYLES: dict[str, Callable[[str, int], list[Member]]] = {
    "numbers": sample,
    "names": named,
    "json": in_json,
    "folders": in_folders,
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("style", STYLES)
def test_every_sample_is_evaluated_once_with_its_label_and_trained_on_in_exact_order(
    style: str, form: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 5)
    if style == "folders" and form == tarfile.USTAR_FORMAT:
        form = tarfile.PAX_FORMAT  # USTAR has no room for such names.
    source = write_tars(tmp_path / "tars", form=form, members=STYLES[style])
    before = files_of(source)
    corpus = adopt(source).corpus
    assert files_of(source) == before
    assert corpus.uri == str(source) and corpus.splits == {"train": 24, "val": 12}
    assert len(corpus.class_names) == 3 and corpus.head.rejected == {}
    for split, first in (("train", 0), ("val", 24)):
        rows = read_all(corpus, split)
        table = corpus.samples(split).to_pylist()
        assert (
            [row[0] for row in rows] == [entry["sample_id"] for entry in table] == list(range(first, first + len(rows)))
        )
        for (number, label, pixels), entry in zip(rows, table, strict=True):
            assert label == entry["label"] == number % 3
            kind = {"names": "PNG", "folders": "PNG", "json": "WEBP"}.get(style, "JPEG")
            assert pixels == load_image(picture(number, kind=kind), SPEC).numpy().tobytes()
    with train_batches(
        corpus, batch_size=8, seed=3, spec=SPEC, augment=AugmentConfig(), total_steps=3, lanes=2, reader=LOCAL
    ) as batches:
        ids = [number for batch in batches for number in batch.sample_ids.tolist()]
    assert sorted(ids) == list(range(24))


def test_a_sample_table_row_frames_its_members_and_a_page_its_samples(tmp_path: Path) -> None:
    corpus = adopt(write_tars(tmp_path, form=tarfile.PAX_FORMAT, members=in_folders)).corpus
    for entry in corpus.samples("val").to_pylist():
        data = store.read(corpus.shard_uri(entry["shard"]), entry["offset"], entry["bytes"])
        found, problem = walk(memoryview(data))
        assert [one.key for one in found] == [entry["key"]] and problem is None
        assert entry["source"] == f"val/x.tar/{entry['key']}.png" and (entry["width"], entry["height"]) == (12, 10)


def test_the_manifest_goes_where_it_is_wanted_and_a_folder_can_be_moved_with_its_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))
    source = write_tars(tmp_path / "tars")
    apart = adopt(source, destination="adopted").corpus
    assert apart.uri == str(tmp_path / "root" / "corpora" / "adopted")
    assert sorted(path.name for path in source.iterdir()) == ["a-train-0.tar", "a-train-1.tar", "val"]
    assert apart.shard_uri(2) == str(source / "val" / "x.tar")
    beside = adopt(source).corpus
    assert beside.digest == apart.digest and beside.shard_uri(2) == apart.shard_uri(2)
    source.rename(tmp_path / "moved")
    moved = open_corpus(f"{tmp_path / 'moved'}@current")
    assert read_all(moved, "val") and moved.shard_uri(2) == str(tmp_path / "moved" / "val" / "x.tar")
    again = adopt(tmp_path / "moved", destination="adopted").corpus  # The same version, whose tars lie elsewhere now.
    assert again.digest == apart.digest and read_all(open_corpus("adopted@current"), "val") == read_all(moved, "val")


def test_tars_that_did_not_change_are_not_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tars(tmp_path)
    assert adopt(source).reused == 0
    write_tars(source, ("b-test.tar",), samples=6)
    grown = adopt(source)
    assert grown.reused == 3 and grown.corpus.splits == {"train": 24, "val": 12, "test": 6}
    assert "3 of 4 tars are as an earlier scan found them" in capsys.readouterr().out
    os.utime(source / "val" / "x.tar", (5, 5))
    assert adopt(source).reused == 3
    assert adopt_tars(recipe(source), keep=False).reused == 0
    assert adopt(source, validate="header").reused == 0


@pytest.mark.stack
def test_with_ray_the_result_is_the_same(tmp_path: Path, stack: Any) -> None:
    source = write_tars(tmp_path / "tars", tuple(f"train-{i}.tar" for i in range(6)), samples=5, members=named)
    alone = adopt(source, destination=str(tmp_path / "alone"))
    with_ray = adopt(source, destination=str(tmp_path / "ray"), num_workers=2)
    assert with_ray.corpus.digest == alone.corpus.digest and with_ray.anomalies == alone.anomalies
    manifests = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "manifests").rglob("*") if path.is_file()}
        for name in ("alone", "ray")
    ]
    assert manifests[0] == manifests[1] and len(manifests[0]) == 5


# Anomalies ------------------------------------------------------------------------------------------------------------

IMAGE, LABEL = picture(90, kind="PNG"), b"1"
ODD: dict[str, tuple[list[Member], dict[str, int], dict[str, int]]] = {
    # members, anomalies, quarantine
    "scattered": (
        [("k.png", IMAGE), *sample("between", 7), ("k.cls", LABEL)],
        {"scattered_key": 2},
        {"scattered_key": 2},
    ),
    "repeated": (
        [("k.png", IMAGE), ("k.cls", LABEL), *sample("between", 7), ("k.png", IMAGE), ("k.cls", LABEL)],
        {"repeated_key": 1},
        {"repeated_key": 1},
    ),
    "no label": ([("k.png", IMAGE)], {"missing_member": 1}, {"missing_label": 1}),
    "empty label": ([("k.png", IMAGE), ("k.cls", b" \n")], {"missing_member": 1}, {"missing_label": 1}),
    "no image": ([("k.cls", LABEL), ("k.txt", b"words")], {"missing_member": 1}, {"missing_image": 1}),
    "dots": ([("k.1.png", IMAGE), ("k.1.cls", LABEL), ("k.2.png", IMAGE)], {"dotted_key": 1}, {"dotted_key": 1}),
    "two members": (
        [("k.png", IMAGE), ("k.PNG", IMAGE), ("k.cls", LABEL)],
        {"duplicate_member": 1},
        {"duplicate_member": 1},
    ),
    "broken image": ([("k.png", IMAGE[:-40]), ("k.cls", LABEL)], {}, {"truncated": 1}),
    "broken pixels": ([("k.png", png_header(64, 64)), ("k.cls", LABEL)], {}, {"corrupt": 1}),
    "bomb": ([("k.png", png_header(30_000, 30_000)), ("k.cls", LABEL)], {}, {"bomb": 1}),
    "no image at all": ([("k.jpg", b"<html>"), ("k.cls", LABEL)], {}, {"not_an_image": 1}),
    "gif": ([("k.gif", picture(3, kind="GIF")), ("k.cls", LABEL)], {}, {"unsupported_format": 1}),
    "conflict": (
        [("k.png", IMAGE), ("k.cls", b"1"), ("k.json", b'{"label": 2}')],
        {"label_conflict": 1},
        {},
    ),
    "loose": ([("README", b"hello"), (".hidden", b"x")], {"loose_member": 2}, {}),
    "folder": ([special("some/", tarfile.DIRTYPE)], {}, {}),
    "symlink": (
        [special("k.png", tarfile.SYMTYPE, "/etc/passwd"), ("k.cls", LABEL)],
        {"unsupported_member": 1, "missing_member": 1},
        {"missing_image": 1},
    ),
    "escape": (
        [("../up.png", IMAGE), ("../up.cls", LABEL)],
        {"unsafe_name": 2},
        {"bad_name": 1},
    ),
    "not utf-8": ([(b"k\xff.png", IMAGE)], {"unsafe_name": 1}, {"bad_name": 1}),
}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("what", ODD)
def test_every_oddity_is_named_and_the_samples_beside_it_are_read(what: str, form: int, tmp_path: Path) -> None:
    members, anomalies, rejected = ODD[what]
    if what == "not utf-8" and form == tarfile.PAX_FORMAT:
        pytest.skip("a PAX writer cannot write such a name")
    adopted = one_tar(tmp_path / "tars", members, form=form)
    assert adopted.anomalies == anomalies
    assert adopted.corpus.head.rejected == rejected
    assert Counter(one.kind for one in adopted.listed) == anomalies
    keys = {one.key for one in adopted.listed}
    assert all(any(part in key for part in ("k", "README", "hidden", "up")) for key in keys)
    whole = {"scattered": 1, "repeated": 2, "conflict": 1}.get(what, 0)
    assert len(read_all(adopted.corpus, "train")) == adopted.corpus.splits["train"] == 6 + whole
    quarantine = adopted.corpus.quarantine().to_pylist()
    assert Counter(row["reason"] for row in quarantine) == rejected
    assert all(row["source"].startswith("x.tar/") and row["detail"] for row in quarantine)
    table = adopted_table(adopted.corpus)
    assert Counter(row["kind"] for row in table) == anomalies


def adopted_table(corpus: Corpus) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    table: list[dict[str, Any]] = pq.read_table(
        Path(corpus.uri) / "manifests" / corpus.digest / "anomalies.parquet"
    ).to_pylist()
    return table


def test_keys_that_several_tars_share_are_counted_and_kept(tmp_path: Path) -> None:
    for name in ("x.tar", "y.tar", "z.tar"):
        number = ord(name[0])
        members = [part for i in range(4) for part in sample(f"{i:03d}", 10 * number + i)]
        (tmp_path / name).write_bytes(foreign_tar(members))
    (tmp_path / "y.tar").write_bytes(foreign_tar([p for i in range(4) for p in sample(f"own{i}", i)]))
    adopted = adopt(tmp_path)
    assert adopted.anomalies == {"shared_key": 4} and adopted.corpus.splits == {"train": 12}
    assert (adopted.listed[0].key, adopted.listed[0].detail) == ("000", "in 2 tars: x.tar, z.tar")
    assert len(read_all(adopted.corpus, "train")) == 12


@pytest.mark.parametrize("end", [b"", b"\0" * 512])
def test_a_tar_without_an_end_mark_is_adopted_and_said(end: bytes, tmp_path: Path) -> None:
    whole = [part for i in range(6) for part in sample(f"{i}", i)]
    (tmp_path / "x.tar").write_bytes(foreign_tar(whole, end=False) + end)
    adopted = adopt(tmp_path)
    assert adopted.anomalies == ({} if end else {"no_end_mark": 1})  # One block of zeros is enough for every reader.
    assert len(read_all(adopted.corpus, "train")) == 6


def test_what_lies_behind_the_end_mark_is_said(tmp_path: Path) -> None:
    first, second = (foreign_tar([p for i in range(3) for p in sample(f"{c}{i}", i)]) for c in "ab")
    (tmp_path / "x.tar").write_bytes(first + second)
    adopted = adopt(tmp_path)
    assert adopted.anomalies == {"trailing_data": 1} and adopted.corpus.splits == {"train": 3}
    assert "two archives laid end to end" in adopted.listed[0].detail


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in a member": lambda data: data[: 9 * 512 + 100],
    "cut in a header": lambda data: data[: 8 * 512 + 100],
    "header garbled": lambda data: data[: 8 * 512] + b"garbage!" * 64 + data[9 * 512 :],
    "bit of a header": lambda data: data[: 8 * 512 + 3] + bytes([data[8 * 512 + 3] ^ 4]) + data[8 * 512 + 4 :],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_tar_that_breaks_off_is_an_error_by_name_or_kept_up_to_there(how: str, tmp_path: Path) -> None:
    write_tars(tmp_path, ("good.tar",))
    tar = foreign_tar([part for i in range(6) for part in sample(f"{i}", 50 + i)])
    (tmp_path / "bad.tar").write_bytes(DAMAGE[how](tar))
    with pytest.raises(
        SourceError, match=r"(?s)1 of 2 tars .* break off\n  bad.tar: byte 4,\d+: .*--damaged keep"
    ) as caught:
        adopt(tmp_path)
    assert "samples before it are whole" in str(caught.value)
    assert not (tmp_path / "current.json").exists()
    kept = adopt(tmp_path, damaged="keep", max_bad_fraction=0.2)
    assert kept.anomalies["damaged"] == 1 and 12 < kept.corpus.splits["train"] < 16
    # The last sample before the damage may have had a member in it: it is not kept, and listed.
    assert kept.corpus.head.rejected == {"truncated": 1}
    assert len(read_all(kept.corpus, "train")) == kept.corpus.splits["train"]


# Labels, classes, limits --------------------------------------------------------------------------------------------


def test_class_names_can_be_given_and_must_fit(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "n", members=named)
    names = ["\u00fcber-<owl>", "dog", "cat", "unused"]
    corpus = adopt(source, classes=names).corpus
    assert corpus.class_names == tuple(names)
    assert [label for _, label, _ in read_all(corpus, "val")][:3] == [2, 1, 0]
    with pytest.raises(SourceError, match="has class 'cat', which is not in `classes`"):
        adopt(source, classes=["dog", "\u00fcber-<owl>"])
    numbers = write_tars(tmp_path / "i")
    assert adopt(numbers, classes=["a", "b", "c"]).corpus.class_names == ("a", "b", "c")
    assert adopt(numbers).corpus.class_names == ("0", "1", "2")
    with pytest.raises(SourceError, match="has label 2, `classes` names 2"):
        adopt(numbers, classes=["a", "b"])


def test_names_and_numbers_do_not_mix_and_one_class_is_none(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "a", ("x.tar",))
    write_tars(source, ("y.tar",), members=named)
    with pytest.raises(
        SourceError, match=r"mixes class numbers \(in x\.tar\) and class names \(such as 'cat' in y\.tar\)"
    ):
        adopt(source)
    single = write_tars(tmp_path / "b", members=lambda key, number: sample(key, number, b"cat"))
    with pytest.raises(SourceError, match="one class only"):
        adopt(single)


def test_too_many_bad_samples_stop_the_run_and_nothing_becomes_visible(tmp_path: Path) -> None:
    write_tars(tmp_path, ("x.tar",), members=lambda key, number: sample(key, number)[: 1 if number % 4 == 0 else 2])
    with pytest.raises(QuarantineError, match=r"3 of 12 images are bad .*missing_label.*\n  x\.tar/00000\.jpg"):
        adopt(tmp_path, max_bad_fraction=0.2)
    with pytest.raises(ManifestError):
        open_corpus(f"{tmp_path}@current")
    assert adopt(tmp_path, max_bad_fraction=0.25).corpus.splits == {"train": 9}


def test_splits_come_from_folder_or_name_or_the_recipe(tmp_path: Path) -> None:
    names = ("imagenet-val-00.tar", "testing/07.tar", "some.tar", "train/val.tar")
    corpus = adopt(write_tars(tmp_path, names, samples=3), split="extra").corpus
    found = {one.name: one.split for one in corpus.shards}
    assert found == dict(zip(names, ("val", "test", "extra", "train"), strict=True))
    assert list(corpus.splits) == ["train", "val", "test", "extra"]


@pytest.mark.parametrize(
    "files, words",
    [
        ({"x.tar.gz": b"1"}, "is compressed: .* unpack it"),
        ({"cat/1.png": b"1"}, "holds no .tar; it holds 1 other files .*vit shard"),
        ({}, "is empty"),
    ],
)
def test_a_source_without_tars_says_what_it_is(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=words):
        adopt(tmp_path)


def test_other_files_beside_the_tars_are_counted_and_our_own_are_not(tmp_path: Path) -> None:
    source = write_tars(tmp_path)
    (source / "README.md").write_text("hello")
    (source / "more.tgz").write_bytes(b"x")
    for _ in range(2):
        assert adopt(source).corpus.head.ignored == {"compressed_tar": 1, "other": 1}


def test_a_tar_that_changes_while_it_is_scanned_is_an_error_by_name(tmp_path: Path) -> None:
    from pipelines.corpus.adoption import list_tars

    listing = list_tars(str(write_tars(tmp_path)))
    os.utime(tmp_path / "val" / "x.tar", (9, 9))
    with pytest.raises(SourceError, match=r"val/x\.tar has changed since it was listed"):
        adopt_tars(recipe(tmp_path), listing)


def test_where_nothing_can_be_written_beside_the_tars_the_remedy_is_said(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "tars")
    (source / "scans").write_text("in the way")
    with pytest.raises(store.StoreError, match=r"cannot write .*--destination"):
        adopt(source)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"damaged": "skip"}, "damaged"),
        ({"split": "Train!"}, "is no split name"),
        ({"max_bad_fraction": 2}, "max_bad_fraction=2"),
        ({"num_workers": -1}, "num_workers=-1 is below 0"),
        ({"classes": ["a", "a"]}, "with different names"),
        ({"shard_bytes": 5}, "shard_bytes: unknown key"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe("s", **settings)


def test_the_command_line_takes_a_source_or_a_recipe() -> None:
    given = parse(IndexRecipe, ["s3://bucket/tars", "--damaged", "keep"])
    assert (given.source, given.damaged) == ("s3://bucket/tars", "keep")
    assert parse(IndexRecipe, ["index/webdataset"]) == load_recipe(IndexRecipe, "index/webdataset")
    with pytest.raises(RecipeError, match="neither a file nor a packaged recipe"):
        parse(IndexRecipe, ["no/such.yaml"])
    with pytest.raises(RecipeError, match="needs a source, or a recipe"):
        parse(IndexRecipe, [])


def test_the_same_tars_give_the_digests_they_always_gave(tmp_path: Path) -> None:
    from .test_shard import DOT

    for name in ("train.tar", "test.tar"):
        members = [part for i in range(9) for part in ((f"{i}.png", DOT), (f"{i}.cls", str(i % 2).encode()))]
        (tmp_path / name).write_bytes(foreign_tar(members, tarfile.USTAR_FORMAT))
    identity = digest_of(index.STAGE, index.VERSION, recipe("s", split="extra", destination="/c"), {"source": "0" * 64})
    found = (identity[:16], adopt(tmp_path).corpus.digest[:16])
    assert found == GOLDEN, "raise VERSION (or SCAN_VERSION, SCHEMA) or restore the result"


GOLDEN = ("9f7c65f52ce6a298", "fd82bc733970a995")  # Identity of the run, digest of the corpus.


@pytest.mark.stack
def test_tars_in_a_bucket_with_identity_and_tracking(tmp_path: Path, stack: Any) -> None:
    """In the bucket, in place: a second run is the first, a lost manifest is made again, a new tar is a new version."""
    name = f"test-index-{os.getpid()}-{np.random.default_rng().integers(1 << 40)}"
    prefix = store.join(store.root(), "uploads", name)
    local = write_tars(tmp_path, members=named)
    for path in local.rglob("*.tar"):
        store.upload(path, store.join(prefix, path.relative_to(local).as_posix()))
    result = index.run(recipe(prefix, num_workers=None))
    corpus = open_corpus(result.uri)
    assert corpus.uri == prefix and corpus.digest == adopt(local).corpus.digest
    assert not result.reused and result.run_id and result.metrics["images"] == 36
    assert read_all(corpus, "val") == read_all(open_corpus(f"{local}@current"), "val")
    assert index.run(recipe(prefix)).reused
    store.delete(store.join(prefix, "manifests", corpus.digest, "head.json"))
    again = index.run(recipe(prefix))
    assert not again.reused and open_corpus(again.uri).digest == corpus.digest
    store.upload(local / "val" / "x.tar", store.join(prefix, "test.tar"))
    assert open_corpus(index.run(recipe(prefix)).uri).splits == {"train": 24, "val": 12, "test": 12}


# Several labels an image --------------------------------------------------------------------------------------------


def several(key: str, number: int) -> list[Member]:
    """A list in .json, of names; every fourth sample has one label of the usual kind."""
    labels = [("cat", "dog", "owl")[i % 3] for i in range(number, number + 1 + number % 2)]
    described = {"label": labels[0]} if number % 4 == 3 else {"labels": labels}
    return [(f"{key}.json", json.dumps(described).encode()), (f"{key}.png", picture(number, kind="PNG"))]


def test_lists_of_labels_stand_in_the_sample_table_and_are_verified(tmp_path: Path) -> None:
    from pipelines.verify import VerifyRecipe, verify

    source = write_tars(tmp_path / "s", members=several)
    (source / "b-train-9.tar").write_bytes(foreign_tar(in_names("p", "dog") + in_names("q", "cat")))
    corpus = adopt(source).corpus
    assert corpus.head.multi_label and corpus.class_names == ("cat", "dog", "owl") and corpus.head.rejected == {}
    number = 0
    for split in ("train", "val"):
        for row in corpus.samples(split).to_pylist()[: 24 if split == "train" else 12]:
            wanted = sorted({i % 3 for i in range(number, number + 1 + number % 2)})
            assert row["labels"] == ([number % 3] if number % 4 == 3 else wanted)
            number += 1
    assert corpus.samples("train")["labels"].to_pylist()[24:] == [[1], [0]]
    checked = from_dict(VerifyRecipe, {"corpus": str(source), "deep": True, "num_workers": 0})
    assert verify(checked).counts == {}
    tar = source / "b-train-9.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"dog"', b'"owl"'))
    assert verify(checked).counts["label"] == 1


def in_names(key: str, name: str) -> list[Member]:
    return [(f"{key}.json", json.dumps({"label": name}).encode()), (f"{key}.png", picture(ord(key), kind="PNG"))]


@pytest.mark.parametrize("labels", ["[]", '"cat"', "[[1]]", "[true]", "[null, 1]", "[-1]", '{"a": 1}'])
def test_what_is_no_list_of_labels_is_a_missing_label(labels: str, tmp_path: Path) -> None:
    odd: list[Member] = [("odd.json", f'{{"labels": {labels}}}'.encode()), ("odd.png", picture(7, kind="PNG"))]
    corpus = one_tar(tmp_path / "s", odd).corpus
    assert corpus.head.rejected == {"missing_label": 1} and not corpus.head.multi_label


def test_tars_with_lists_of_labels_are_sharded_and_lists_beside_single_labels_are_refused(tmp_path: Path) -> None:
    from pipelines.shard import ShardRecipe, make_corpus

    def lists(key: str, number: int) -> list[Member]:
        described = json.dumps({"labels": [number % 3, 3]}).encode()
        return [(f"{key}.json", described), (f"{key}.png", picture(number, kind="PNG"))]

    source = write_tars(tmp_path / "s", members=lists)
    values = {"source": str(source), "destination": str(tmp_path / "c"), "num_workers": 0}
    corpus = make_corpus(from_dict(ShardRecipe, values))
    assert corpus.head.multi_label and corpus.splits == {"train": 24, "val": 12}
    assert {tuple(row) for row in corpus.samples("train")["labels"].to_pylist()} == {(0, 3), (1, 3), (2, 3)}
    (source / "z.tar").write_bytes(foreign_tar(sample("one", 1)))
    with pytest.raises(SourceError, match=r"z.tar has samples with one label where others"):
        make_corpus(from_dict(ShardRecipe, values))


def test_a_class_number_of_hundreds_of_millions_is_refused_and_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(foreign_tar(sample("a", 0) + sample("b", 1, label=b"999999999")))
    with pytest.raises(SourceError, match=r"label 999999999 \(in x.tar\); class numbers count from 0"):
        adopt(tmp_path)


def test_a_tar_that_is_really_gzip_says_so(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "x.tar").write_bytes(gzip.compress(foreign_tar(sample("a", 1))))
    with pytest.raises(SourceError, match=r"compressed .*unpack it"):
        adopt(tmp_path)


@pytest.mark.parametrize("name", ["x.tar.gz", "more.tgz", "x.tar.zst"])
def test_packed_tars_are_refused_with_the_remedy_by_both_verbs(name: str, tmp_path: Path) -> None:
    from pipelines.corpus.sources import open_source

    (tmp_path / name).write_bytes(b"x")
    for place in (tmp_path, tmp_path / name):
        for call in (adopt, lambda path: open_source(str(path))):
            with pytest.raises(SourceError, match=r"is compressed: no range of it can be read, unpack it"):
                call(place)


def test_what_is_kept_of_each_tar_is_small_however_many_classes_and_pages_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.corpus.scanned import ScannedTar

    monkeypatch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 1)
    members = [m for i in range(40) for m in ((f"{i}.png", picture(i)), (f"{i}.cls", str(3 + i).encode()))]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.tar").write_bytes(tar_bytes(members))
    made = adopt_tars(IndexRecipe(source=str(tmp_path / "t"), destination=str(tmp_path / "c"), num_workers=0)).corpus
    assert len(made.class_names) == 43 and len(made.pages("train")) == 40
    (stored,) = ((store.read_json(str(path))) for path in tmp_path.rglob("scans/*/*.json") if path.stem != "about")
    assert stored["numbers"] == [3, 42] and len(stored["page_rows"]) == 40
    scan = ScannedTar.from_json(stored)
    assert scan.to_json() == stored and isinstance(scan.page_offset, array)
