from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipelines.corpus.errors import CorpusError, SourceError
from pipelines.corpus.fetch import fetch, read_source
from pipelines.corpus.listing import local_etag
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.sources import open_source, split_from_name
from pipelines.shard import ShardRecipe, make_corpus

from .inputs import class_folders, idx_folder, picture, planned, tar_bytes, tar_folder


def test_class_folders_give_one_entry_a_file(tmp_path: Path) -> None:
    source = open_source(str(class_folders(tmp_path / "s", {"cat": 3, "dog/brown": 2})))
    entries = source.entries()
    assert source.kind == "files"
    assert list(entries.path) == [
        "cat/0000.png",
        "cat/0001.jpg",
        "cat/0002.png",
        "dog/brown/0000.png",
        "dog/brown/0001.jpg",
    ]
    assert list(entries.label) == ["cat"] * 3 + ["dog"] * 2 and set(entries.split) == {None}
    for path, data in zip(entries.path, fetch("files", planned(entries)), strict=True):
        assert data == (tmp_path / "s" / path).read_bytes()


def test_top_folders_named_as_splits_are_splits(tmp_path: Path) -> None:
    counts = {"train/cat": 2, "train/dog": 2, "validation/cat": 1, "test/dog": 1}
    entries = open_source(str(class_folders(tmp_path / "s", counts))).entries()
    assert dict(zip(entries.path, entries.split, strict=True))["validation/cat/0000.png"] == "val"
    assert [entries.split.count(name) for name in ("train", "val", "test")] == [4, 1, 1]
    assert set(entries.label) == {"cat", "dog"}


def test_a_class_named_train_beside_others_is_a_class(tmp_path: Path) -> None:
    entries = open_source(str(class_folders(tmp_path / "s", {"train": 2, "car": 2}))).entries()
    assert set(entries.label) == {"train", "car"} and set(entries.split) == {None}


def test_every_file_is_an_entry_or_quarantined_or_counted(tmp_path: Path) -> None:
    base = class_folders(tmp_path / "s", {"cat": 3, "dog": 3})
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture(77))
    (base / "LICENSE").write_text("free")
    (base / "loose.png").write_bytes(picture(78))
    (base / "cat" / "notes.txt").write_text("a text among images")
    (base / "cat" / ".DS_Store").write_text("x")
    (base / "cat" / "twice.png").symlink_to(base / "dog" / "0000.png")
    (base / "cat" / "linked.png").symlink_to(outside)
    (base / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    (base / "dog" / "loop").symlink_to(base)
    os.mkfifo(base / "dog" / "pipe.png")
    (base / "dog" / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(79))
    entries = open_source(str(base)).entries()
    assert set(entries.path) == {
        *(f"{name}/{i:04d}.{end}" for name in ("cat", "dog") for i, end in enumerate(("png", "jpg", "png"))),
        "cat/linked.png",
        "cat/notes.txt",
    }
    assert {(item.source, item.reason) for item in entries.rejected} == {
        ("loose.png", "missing_label"),
        ("dog/caf\\udce9.png", "bad_name"),
    }
    assert dict(entries.ignored) == {"symlink": 2, "broken_symlink": 1, "hidden": 1, "device": 1, "other": 1}
    on_disk = sum(len(names) for _, _, names in os.walk(base))
    assert len(entries) + len(entries.rejected) + sum(entries.ignored.values()) - 1 == on_disk  # -1: the folder link


def test_a_copy_that_keeps_its_times_is_the_same_source_and_a_touched_file_is_not(tmp_path: Path) -> None:
    base = class_folders(tmp_path / "s", {"cat": 2, "dog": 2})
    digest = open_source(str(base)).digest
    copy = shutil.copytree(base, tmp_path / "copy")
    assert open_source(str(copy)).digest == digest
    os.utime(copy / "cat" / "0000.png", (1, 1))
    assert open_source(str(copy)).digest != digest


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda base: base.mkdir(), "is empty"),
        (lambda base: None, "does not exist"),
        (lambda base: class_folders(base, {"cat": 3}), "one class only (cat)"),
        (lambda base: class_folders(base, {"train": 3, "test": 1}), "no class folders"),
        (lambda base: class_folders(base, {".": 3}), "gives no sample"),
        (lambda base: (base.mkdir(), (base / "a.txt").write_text("x")), "holds no image"),
        (
            lambda base: (class_folders(base, {"cat": 1, "dog": 1}), (base / "x.tar").write_bytes(b"")),
            "one kind of them",
        ),
        (lambda base: (idx_folder(base), (base / "t10k-labels-idx1-ubyte.gz").unlink()), "has no labels beside it"),
        (lambda base: (idx_folder(base), (base / "t10k-images-idx3-ubyte.gz").unlink()), "has no images beside it"),
    ],
)
def test_a_source_that_cannot_be_used_says_why_and_what_to_do(make: object, words: str, tmp_path: Path) -> None:
    make(tmp_path / "photos")  # type: ignore[operator]
    with pytest.raises(SourceError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
        open_source(str(tmp_path / "photos")).entries()
    assert "photos" in str(caught.value)


def test_a_mistyped_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(SourceError, match="nearest: images"):
        open_source(str(tmp_path / "imagse"))


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-000.tar", "train"),
        ("imagenet_val_01.tar", "val"),
        ("t10k-images-idx3-ubyte", "test"),
        ("training-images", "train"),
        ("constraint.tar", None),
        ("shard-0001.tar", None),
    ],
)
def test_a_split_is_a_whole_word_of_the_file_name(name: str, split: str | None) -> None:
    assert split_from_name(name) == split


# Tars ---------------------------------------------------------------------------------------------------------------


def test_tars_of_others_are_read_sample_by_sample(tmp_path: Path) -> None:
    base = tar_folder(tmp_path / "s")
    source = open_source(str(base))
    entries = source.entries()
    assert source.kind == "tars" and len(entries) == 30
    assert list(entries.label)[:4] == [0, 1, 2, 0] and dict(entries.ignored) == {"tar_member_txt": 30}
    with tarfile.open(base / "some-001.tar") as tar:
        whole = {f"some-001.tar/{m.name}": tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    found = dict(zip(entries.path, fetch("tars", planned(entries)), strict=True))
    assert found["some-001.tar/01/00003.jpg"] == whole["some-001.tar/01/00003.jpg"]
    assert {path for path in found if path.startswith("some-001")} == {path for path in whole if path.endswith("jpg")}


def test_labels_are_numbers_or_names_in_cls_or_json(tmp_path: Path) -> None:
    members = [
        ("a.jpg", picture(1)),
        ("a.json", b'{"label": 3}'),
        ("b.cls", b" 1\n"),
        ("b.jpg", picture(2)),
        ("c.jpg", picture(3)),
        ("d.cls", b"2"),
        ("e.cls", b"2"),
        ("e.json", b"{broken"),
        ("e.jpg", picture(4)),
        ("f.jpg", picture(5)),
        ("f.json", b'{"label": null}'),
    ]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    entries = open_source(str(tmp_path / "x.tar")).entries()
    assert dict(zip(entries.path, entries.label, strict=True)) == {"x.tar/a.jpg": 3, "x.tar/b.jpg": 1, "x.tar/e.jpg": 2}
    assert {(item.source, item.reason) for item in entries.rejected} == {
        ("x.tar/c.jpg", "missing_label"),
        ("x.tar/d", "missing_image"),
        ("x.tar/f.jpg", "missing_label"),
    }


def broken_header(data: bytes) -> bytes:
    at = data.index(b"00/00005.cls")
    return data[:at] + b"\xff" * 512 + data[at + 512 :]


@pytest.mark.parametrize(
    "damage, words",
    [
        (broken_header, "broken tar header at byte"),
        (lambda data: data[:5000], "broken tar header|damaged tar"),
        (lambda data: b"not a tar at all" * 100, "damaged tar"),
        (lambda data: data[:10240] + data[:10240], "broken tar header|damaged tar|two members|twice"),
    ],
)
def test_a_damaged_tar_is_an_error_by_name_where_tarfile_would_drop_the_rest(
    damage: object, words: str, tmp_path: Path
) -> None:
    base = tar_folder(tmp_path / "s")
    bad = base / "some-000.tar"
    bad.write_bytes(damage(bad.read_bytes()))  # type: ignore[operator]
    with pytest.raises(SourceError, match=words) as caught:
        open_source(str(base)).entries()
    assert "some-000.tar" in str(caught.value)


def test_links_devices_and_paths_that_escape_have_no_effect(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for i, name in enumerate(("../../escape", "/etc/cron", "fine", "a..b/fine")):
            for end, data in (("cls", str(i).encode()), ("png", picture(i))):
                info = tarfile.TarInfo(f"{name}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x.tar").write_bytes(file.getvalue())
    entries = open_source(str(tmp_path / "s")).entries()
    assert list(entries.path) == ["x.tar/fine.png", "x.tar/a..b/fine.png"]
    assert entries.ignored == {"tar_link_or_device": 3, "tar_member_outside": 2}
    assert [(item.reason, item.source) for item in entries.rejected] == [
        ("bad_name", "x.tar/../../escape.png"),
        ("bad_name", "x.tar//etc/cron.png"),
    ]
    assert all(isinstance(data, bytes) for data in fetch("tars", planned(entries)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["s", "x.tar"]


# Sources that change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "idx", "tars"])
@pytest.mark.parametrize("change", ["rewritten", "gone"])
def test_a_source_that_changed_since_the_plan_is_an_error_by_name(kind: str, change: str, tmp_path: Path) -> None:
    make = {"files": lambda base: class_folders(base, {"cat": 2, "dog": 2}), "idx": idx_folder, "tars": tar_folder}[
        kind
    ]
    make(tmp_path / "s")
    entries = open_source(str(tmp_path / "s")).entries()
    victim = Path(list(entries.uri)[-1])
    victim.unlink() if change == "gone" else os.utime(victim, (5, 5))
    with pytest.raises(SourceError, match="gone since" if change == "gone" else "has changed since") as caught:
        list(fetch(kind, planned(entries)))
    assert str(victim) in str(caught.value)


def test_links_that_lead_round_or_nowhere_are_counted(tmp_path: Path) -> None:
    base = class_folders(tmp_path / "s", {"cat": 3, "dog": 3})
    (base / "cat" / "self.png").symlink_to("self.png")
    (base / "cat" / "gone.png").symlink_to(base / "dog" / "no.png")
    (tmp_path / "x").symlink_to(tmp_path / "y")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    (base / "dog" / "round.png").symlink_to(tmp_path / "x")
    entries = open_source(str(base)).entries()
    assert len(entries) == 6 and dict(entries.ignored) == {"broken_symlink": 3}


def test_a_file_is_read_no_further_than_its_size(tmp_path: Path) -> None:
    device = Path("/dev/zero")
    assert read_source(str(device), local_etag(device.stat())) == b""


@pytest.mark.parametrize("layout", ["{name}", "train/{name}"])
def test_a_folder_without_an_image_is_no_class(layout: str, tmp_path: Path) -> None:
    class_folders(tmp_path, {layout.format(name=name): 5 for name in ("cat", "dog")})
    plain = open_source(str(tmp_path))
    assert not plain.has_idle_folders
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "train.txt").write_text("cat/0000\n")
    (tmp_path / layout.format(name="metadata")).mkdir()
    (tmp_path / layout.format(name="metadata") / "info.json").write_text("{}")
    (tmp_path / layout.format(name="cat") / "notes.txt").write_text("of a class")
    source = open_source(str(tmp_path))
    entries = source.entries()
    assert source.has_idle_folders and set(entries.labels) == {"cat", "dog"} and len(entries) == 11
    assert entries.ignored == {"folder_without_image": 2} and not entries.rejected


def test_a_class_whose_images_have_no_endings_stays_a_class(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "0001").write_bytes(picture(1))
    assert set(open_source(str(tmp_path)).entries().labels) == {"cat", "dog", "owl"}


def test_images_of_all_tars_are_shuffled_together_in_two_passes(tmp_path: Path) -> None:
    source = tar_folder(tmp_path / "s", tars=9, samples=20)

    def shard(source: Path, base: Path, **settings: Any) -> Corpus:
        values: dict[str, Any] = {
            "source": str(source),
            "destination": str(base),
            "shard_bytes": 3000,
            "num_workers": 0,
        } | settings
        return make_corpus(ShardRecipe(**values))

    whole, mixed = shard(source, tmp_path / "a"), shard(source, tmp_path / "b", shuffle=True)

    def contents(corpus: Corpus) -> Counter[Any]:
        return Counter((row["content"], row["label"]) for row in corpus.samples("train").to_pylist())

    assert contents(whole) == contents(mixed) and mixed.digest != whole.digest
    tars = [row["source"].split("/")[0] for row in mixed.samples("train").to_pylist()]
    assert sum(a != b for a, b in pairwise(tars)) > 120  # Of 179 neighbours.
    assert len(set(tars[:20])) > 5
    with pytest.raises(CorpusError, match="shuffle has no effect"):
        shard(class_folders(tmp_path / "f", {"cat": 3, "dog": 3}), tmp_path / "c", shuffle=True)
