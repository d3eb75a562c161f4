"""Lists of images as a source, samples with several labels, smaller images, and copies by choice."""

from __future__ import annotations

import csv
import io
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import store
from pipelines.config import from_dict
from pipelines.corpus import lists
from pipelines.corpus.errors import CorpusError, SourceError
from pipelines.corpus.images import inspect_image
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.corpus.resize import ResizeConfig, shrink
from pipelines.corpus.sources import open_source
from pipelines.shard import ShardRecipe, make_corpus

from .inputs import class_folders, picture


def shard(source: Path, base: Path, **settings: Any) -> Corpus:
    values = {"source": str(source), "destination": str(base), "shard_bytes": 3000, "num_workers": 0}
    return make_corpus(from_dict(ShardRecipe, values | settings))


def write_list(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {name: ";".join(value) if isinstance(value, list) else value for name, value in row.items()}
                for row in rows
            )
    return path


def images(folder: Path, count: int = 24) -> list[str]:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(picture(i))
    return [f"{folder.name}/{i:03d}.png" for i in range(count)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_list_gives_each_image_its_label_and_split(kind: str, tmp_path: Path) -> None:
    names = images(tmp_path / "pics")
    rows = [
        {"uri": name, "label": "xyz"[i % 3], "split": "validation" if i % 6 == 0 else "train"}
        for i, name in enumerate(names)
    ]
    rows[5]["uri"] = str(tmp_path / "pics" / "005.png")  # Absolute ones are taken as they are.
    corpus = shard(write_list(tmp_path / f"list.{kind}", rows), tmp_path / "c")
    assert corpus.splits == {"train": 20, "val": 4} and corpus.class_names == ("x", "y", "z")
    found = {row["source"]: row["label"] for split in corpus.splits for row in corpus.samples(split).to_pylist()}
    assert found == {row["uri"]: "xyz".index(row["label"]) for row in rows}


def test_every_row_of_a_list_is_in_the_corpus_or_in_quarantine(tmp_path: Path) -> None:
    rows = [{"uri": name, "label": "xy"[i % 2]} for i, name in enumerate(images(tmp_path / "pics"))]
    rows[0]["label"] = ""
    rows[1]["uri"] = "pics/none.png"
    corpus = shard(write_list(tmp_path / "list.csv", rows), tmp_path / "c", max_bad_fraction=0.1)
    assert corpus.splits == {"train": 22} and corpus.head.rejected == {"missing_label": 1, "unreadable": 1}
    assert corpus.head.bad_fraction == pytest.approx(2 / 24, abs=1e-6)
    assert set(corpus.quarantine()["source"].to_pylist()) == {"pics/000.png", "pics/none.png"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no rows"),
        ("path,label\na,b\n", "no `uri`"),
        ("uri,name\na,b\n", "neither `label` nor `labels`"),
        ("uri,label,labels\na,b,c\n", "both `label` and `labels`"),
        ("uri,label\nx.png,a\nx.png,b\n", "occurs twice"),
        ('uri,label\nx.png,"a\nx.png,b\n', "cannot be read"),
        ('uri,label\nx.png,"a\nx.png,"b"\nx.png,c\n', "cannot be read"),
        ("uri\nx.png\n", "neither `label` nor `labels`"),
        ("uri\nx.png,a\n", "row 1 has more fields than the header"),
        ("uri,label\nx.png,a,b\n", "row 1 has more fields than the header"),
        ("uri,label\nx.png,7\n./x.png,007\n", "'7' and '007', which are one class number"),
        ("uri,label\nx.png,a\n", r"one class only \(a\); a classifier needs two or more$"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture(1))
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SourceError, match=words):
        shard(tmp_path / "list.csv", tmp_path / "c")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_several_labels_an_image_stand_in_json_and_in_the_sample_table(kind: str, tmp_path: Path) -> None:
    names = images(tmp_path / "pics")
    rows = [{"uri": name, "labels": ["tree", "sky", "dog"][: 1 + i % 3]} for i, name in enumerate(names)]
    corpus = shard(write_list(tmp_path / f"list.{kind}", rows), tmp_path / "c")
    assert corpus.head.multi_label and corpus.class_names == ("dog", "sky", "tree")
    assert corpus == open_corpus(f"{tmp_path / 'c'}@current")
    wanted = {row["uri"]: sorted(corpus.class_names.index(name) for name in row["labels"]) for row in rows}
    table = corpus.samples("train")
    assert dict(zip(table["source"].to_pylist(), table["labels"].to_pylist(), strict=True)) == wanted
    for row in table.to_pylist():
        data = store.read(corpus.shard_uri(row["shard"]), row["offset"], row["bytes"])
        assert f'"labels":{json.dumps(row["labels"], separators=(",", ":"))}'.encode() in data and b".cls" not in data


# Smaller images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, size", [("shortest", (60, 30)), ("longest", (30, 15))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_made_smaller_and_small_ones_keep_their_bytes(side: Any, size: tuple[int, int], kind: str) -> None:
    config = ResizeConfig(side=side, pixels=30, quality=90)
    large, small = picture(1, (120, 60), kind), picture(2, (30, 30), kind)
    assert shrink(small, inspect_image(small), config)[0] == small
    data, facts = shrink(large, inspect_image(large), config)
    found = inspect_image(data)
    assert (found.width, found.height) == size == (facts.width, facts.height) and "resized" in facts.notes
    assert found.extension == facts.extension == ("png" if kind == "PNG" else "jpg")
    assert shrink(large, inspect_image(large), config)[0] == data


def test_a_turned_photo_is_upright_after_it_was_made_smaller() -> None:
    image = Image.fromarray(np.repeat(np.arange(80, dtype=np.uint8)[None, :, None] * 3, 40, 0).repeat(3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    facts = inspect_image(file.getvalue())
    data, small = shrink(file.getvalue(), facts, ResizeConfig(pixels=20))
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert (small.width, small.height) == (20, 40) == pixels.shape[::-1]
    assert (np.diff(pixels.mean(axis=1)) > 0).all()


def test_a_corpus_of_smaller_images_counts_them_and_is_another_plan(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"cat": 10, "dog": 10}, ("JPEG",), (64, 48))
    corpus = shard(source, tmp_path / "c", resize={"side": "shortest", "pixels": 24})
    assert corpus.head.noted == {"resized": 20}
    assert {(row["width"], row["height"]) for row in corpus.samples("train").to_pylist()} == {(32, 24)}
    assert shard(source, tmp_path / "c").digest != corpus.digest
    for values in ({"pixels": 3}, {"pixels": 99, "quality": 0}, {"pixels": 99, "side": "left"}):
        with pytest.raises(ValueError, match=r"resize|side"):
            from_dict(ShardRecipe, {"source": "s", "destination": "c", "resize": values})


# Copies -------------------------------------------------------------------------------------------------------------


def test_copies_are_kept_and_counted_or_all_but_one_are_left_out(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"train/cat": 12, "train/dog": 12, "test/cat": 4, "test/dog": 4})
    (source / "train" / "dog" / "copy.png").write_bytes((source / "train" / "dog" / "0000.png").read_bytes())
    (source / "train" / "cat" / "leak.png").write_bytes((source / "test" / "cat" / "0000.png").read_bytes())
    kept = shard(source, tmp_path / "c")
    assert kept.splits == {"train": 26, "test": 8} and kept.head.duplicates == {"images": 2, "across_splits": 1}
    made = shard(source, tmp_path / "c", duplicates="quarantine", max_bad_fraction=0)
    assert made.splits == {"train": 24, "test": 8} and made.head.rejected == {"duplicate": 2}
    assert made.head.bad_fraction == 0 and made.digest != kept.digest
    out = {row["source"]: row["detail"] for row in made.quarantine().to_pylist()}
    assert out["train/cat/leak.png"] == "the same bytes as test/cat/0000.png"  # The held-out copy stays.
    assert len(out) == 2 and set(out) & {"train/dog/copy.png", "train/dog/0000.png"}
    names = [row["source"] for row in made.samples("train").to_pylist()]
    assert not set(names) & set(out) and len(names) == 24


def test_copies_are_found_in_turns_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = class_folders(tmp_path / "s", {"cat": 30, "dog": 30})
    for i in range(9):
        (source / "dog" / f"copy{i}.png").write_bytes((source / "cat" / f"{2 * i:04d}.png").read_bytes())
    once = shard(source, tmp_path / "a", duplicates="quarantine")
    monkeypatch.setattr("pipelines.corpus.duplicates.TOGETHER", 7)
    monkeypatch.setattr("pipelines.corpus.parts.KEPT_ROWS", 7)
    turns = shard(source, tmp_path / "b", duplicates="quarantine")
    assert once.digest == turns.digest and once.head.duplicates == turns.head.duplicates
    assert once.head.duplicates == {"images": 9, "across_classes": 9} and once.quarantine() == turns.quarantine()


# Shuffling over all tars ---------------------------------------------------------------------------------------------


def test_a_corpus_is_a_source_whose_images_are_checked_by_their_hash(tmp_path: Path) -> None:
    first = shard(class_folders(tmp_path / "s", {"cat": 20, "dog": 20}), tmp_path / "a")
    again = make_corpus(
        ShardRecipe(source=first.reference, destination=str(tmp_path / "b"), shard_bytes=9000, seed=5, num_workers=0)
    )
    assert again.class_names == first.class_names and again.splits == first.splits
    for name in ("source", "content", "label"):
        assert sorted(first.samples("train")[name].to_pylist()) == sorted(again.samples("train")[name].to_pylist())
    tar = Path(first.shard_uri(0))
    data = bytearray(tar.read_bytes())
    data[700:2000] = bytes(1300)
    tar.write_bytes(data)
    with pytest.raises(CorpusError, match="is not what the manifest says"):
        make_corpus(ShardRecipe(source=first.reference, destination=str(tmp_path / "c"), num_workers=0))


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"uri": "pics/000.png", "label": "x", "split": "../../out"}', "'../../out' is no split name"),
        ('{"uri": "pics/000.png", "label": "x", "split": "Tra in"}', "'tra in' is no split name"),
        ('{"uri": "pics/000.png", "label": 99999999999999999999}', "class numbers count from 0, up to 999,999"),
        ('{"uri": "pics/000.png", "label": 2000000000}', "class numbers count from 0, up to 999,999"),
        ('{"uri": "pics/000.png", "label": ' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read"),
    ],
)
def test_a_hostile_list_is_an_error_that_says_why_and_writes_nothing(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "000.png").write_bytes(picture(0))
    kind = type(json.loads(line)["label"]) if len(line) < 1000 else str
    second = json.dumps({"uri": "pics/./000.png", "label": kind(1)})
    (tmp_path / "list.jsonl").write_text(f"{line}\n{second}\n")
    with pytest.raises(SourceError, match=words):
        shard(tmp_path / "list.jsonl", tmp_path / "deep" / "c")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["000.png", "list.jsonl", "pics"]


def test_a_list_of_far_too_many_splits_and_a_name_with_a_nul_are_told(tmp_path: Path) -> None:
    rows = [{"uri": f"{i}.png", "label": "xy"[i % 2], "split": f"s{i}"} for i in range(101)]
    for row in rows:
        (tmp_path / str(row["uri"])).write_bytes(picture(1))
    with pytest.raises(SourceError, match="more than 100 splits"):
        shard(write_list(tmp_path / "list.jsonl", rows), tmp_path / "c")
    odd = [{"uri": "a\0.png", "label": "x"}, *({"uri": f"{i}.png", "label": "xy"[i]} for i in range(2))]
    corpus = shard(write_list(tmp_path / "odd.jsonl", odd), tmp_path / "c", max_bad_fraction=0.5)
    assert corpus.head.rejected == {"unreadable": 1}


def quarantine(corpus: Corpus) -> dict[str, tuple[str, str]]:
    return {row["source"]: (row["reason"], row["detail"]) for row in corpus.quarantine().to_pylist()}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_numbers_that_pandas_made_floats_are_class_numbers_and_their_gap_is_told(kind: str, tmp_path: Path) -> None:
    rows = [{"uri": name, "label": float(i % 3)} for i, name in enumerate(images(tmp_path / "pics"))]
    rows[0]["label"] = float("nan")
    corpus = shard(write_list(tmp_path / f"list.{kind}", rows), tmp_path / "c", max_bad_fraction=0.1)
    assert corpus.class_names == ("0", "1", "2") and corpus.splits == {"train": 23}
    assert quarantine(corpus) == {"pics/000.png": ("missing_label", "the row of the list has none")}


@pytest.mark.parametrize(
    "value, words", [(True, "True is neither"), (-1, "-1 is"), ("-1", "'-1' is"), (["x"], "`labels`")]
)
def test_a_label_of_another_kind_is_quarantined_with_what_it_is(value: object, words: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"uri": name, "label": i % 3} for i, name in enumerate(images(tmp_path / "pics"))]
    rows[5]["label"] = value
    corpus = shard(write_list(tmp_path / "list.jsonl", rows), tmp_path / "c", max_bad_fraction=0.1)
    assert corpus.class_names == ("0", "1", "2")
    (reason, detail) = quarantine(corpus)["pics/005.png"]
    assert reason == "missing_label" and words in detail


def test_names_that_utf8_cannot_say_are_quarantined(tmp_path: Path) -> None:
    rows = [{"uri": name, "label": "xy"[i % 2]} for i, name in enumerate(images(tmp_path / "pics"))]
    rows[0]["label"] = "\ud800"
    rows[1]["uri"] = "pics/\ud800.png"
    corpus = shard(write_list(tmp_path / "list.jsonl", rows), tmp_path / "c", max_bad_fraction=0.1)
    assert corpus.head.rejected == {"bad_name": 1, "missing_label": 1}
    assert set(quarantine(corpus)) == {"pics/000.png", "pics/\\ud800.png"}


def test_a_pipe_or_a_device_in_a_list_is_never_read(tmp_path: Path) -> None:
    rows = [{"uri": name, "label": "xy"[i % 2]} for i, name in enumerate(images(tmp_path / "pics"))]
    os.mkfifo(tmp_path / "pipe.png")
    for number, name in enumerate(("pipe.png", "/dev/zero", ".")):
        rows[number]["uri"] = name
    corpus = shard(write_list(tmp_path / "list.csv", rows), tmp_path / "c", max_bad_fraction=0.2)
    assert set(quarantine(corpus).values()) == {("unreadable", "a folder, a pipe or a device")}
    assert corpus.head.rejected == {"unreadable": 3}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_of_a_list_only_columns_are_kept(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many rows are alive at a time as are looked up together."""
    (tmp_path / "pics").mkdir()
    rows = [{"uri": f"pics/{i:05d}.png", "label": f"class{i % 3}"} for i in range(2000)]
    for row in rows:
        (tmp_path / row["uri"]).touch()
    source = write_list(tmp_path / f"list.{kind}", rows)
    monkeypatch.setattr("pipelines.corpus.lists.TOGETHER", 100)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched(dict[str, Any]):
        __hash__ = object.__hash__  # type: ignore[assignment]

    real = lists._rows

    def watched(listed: Any) -> Iterator[Any]:
        nonlocal most
        for row in real(listed):
            one = Watched(row)
            alive.add(one)
            most = max(most, len(alive))
            yield one

    monkeypatch.setattr(lists, "_rows", watched)
    found = open_source(str(source))
    assert 0 < most <= 202 and not isinstance(found.files, list)
    assert list(found.entries().path) == [row["uri"] for row in rows]


def test_a_line_of_jsonl_ends_where_json_says(tmp_path: Path) -> None:
    """U+2028 stands in JSON text as it is, and is an end of line to str.splitlines()."""
    rows = [{"uri": name, "label": f"a\u2028{i % 2}"} for i, name in enumerate(images(tmp_path / "pics"))]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert shard(path, tmp_path / "c").class_names == ("a\u20280", "a\u20281")


@pytest.mark.parametrize("text", ['a.png,"cat\nb.png,dog\nc.png,"owl"\n', 'a.png,cat\nb.png,"dog\nc.png,owl\n'])
def test_a_quote_that_is_not_closed_swallows_no_rows(text: str, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    (tmp_path / "list.csv").write_text(f"uri,label\n{text}")
    with pytest.raises(SourceError, match=r"list.csv cannot be read"):
        shard(tmp_path / "list.csv", tmp_path / "c")
