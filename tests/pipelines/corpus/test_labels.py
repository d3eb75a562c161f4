"""One rule for labels: a tar gives `vit shard`, `vit index` and the reader the same, and a list follows it too."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.corpus.errors import SourceError
from pipelines.corpus.labels import as_label, parse_labels
from pipelines.corpus.manifest import Corpus
from pipelines.index import IndexRecipe, adopt_tars
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.verify import VerifyRecipe, verify

from .inputs import picture, tar_bytes


@pytest.mark.parametrize(
    "value, label",
    [
        ("cat", "cat"),
        ("7", 7),
        ("007", 7),
        ("999999999", 999_999_999),
        ("1000000001", "1000000001"),
        ("9" * 6000, "9" * 6000),
        ("²", "²"),
        (3, 3),
        (3.0, 3),
        ("", None),
        ("-1", None),
        (-1, None),
        (1.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (True, None),
        (None, None),
        (["cat"], None),
        ("\ud800", None),
    ],
)
def test_what_is_a_label(value: object, label: int | str | None) -> None:
    assert as_label(value) == label and type(as_label(value)) is type(label)


def test_a_list_of_labels_with_something_else_in_it_is_none() -> None:
    assert parse_labels(b'{"labels": ["b", "a", "b"]}') == ("b", "a")
    assert parse_labels(b'{"labels": ["b", "\\ud800"]}') is None


def both(folder: Path, **settings: Any) -> tuple[Corpus, Corpus]:
    """The tars of a folder, sharded and indexed."""
    values = {"source": str(folder), "num_workers": 0, "max_bad_fraction": 0.1, **settings}
    sharded = make_corpus(ShardRecipe(destination=str(folder.parent / "sharded"), **values))
    return sharded, adopt_tars(IndexRecipe(destination=str(folder.parent / "indexed"), **values)).corpus


def labels(corpus: Corpus) -> dict[str, str]:
    rows = corpus.samples("train").to_pylist()
    return {row["source"]: corpus.class_names[row["label"]] for row in rows}


def put(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "x.tar").write_bytes(tar_bytes(members))
    return folder


NAMED = [
    member
    for i in range(20)
    for member in ((f"{i:03d}.png", picture(i)), (f"{i:03d}.json", json.dumps({"label": f"c{i % 2}"}).encode()))
]
IMAGE = ("s.png", picture(999))
DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "odd, count",
    [
        ([IMAGE, ("s.json", b'{"label": "\\ud800"}')], 20),
        ([IMAGE, ("s.json", b'{"label": ' + DEEP + b"}")], 20),
        ([IMAGE, ("s.json", b'{"label": -1}')], 20),
        ([IMAGE, ("s.cls", b"-1")], 20),
        ([IMAGE, ("s.cls", b"9" * 6000)], 21),
        ([IMAGE, ("s.cls", b"1000000001")], 21),
        ([IMAGE, ("s.cls", b"\xff"), ("s.json", b'{"label": "c1"}')], 21),
    ],
)
def test_one_odd_label_is_the_same_to_shard_and_to_index_and_stops_neither(
    odd: list[tuple[str, bytes]], count: int, tmp_path: Path
) -> None:
    sharded, indexed = both(put(tmp_path / "t", NAMED + odd))
    assert labels(sharded) == labels(indexed) and len(labels(sharded)) == count
    assert sharded.head.rejected == indexed.head.rejected == ({"missing_label": 1} if count == 20 else {})
    assert verify(VerifyRecipe(corpus=indexed.uri, num_workers=0)).counts == {}


def test_numbers_with_nine_digits_are_numbers_and_those_with_more_are_names(tmp_path: Path) -> None:
    members = [
        member
        for i in range(8)
        for member in ((f"{i}.png", picture(i)), (f"{i}.cls", str(1_000_000_000 + i % 2).encode()))
    ]
    for corpus in both(put(tmp_path / "t", members)):
        assert corpus.class_names == ("1000000000", "1000000001")


def test_of_two_images_of_a_sample_shard_and_index_take_the_same(tmp_path: Path) -> None:
    members = [
        member
        for i in range(6)
        for member in (
            (f"{i}.jpeg", picture(i, kind="JPEG")),
            (f"{i}.png", picture(100 + i)),
            (f"{i}.cls", str(i % 2).encode()),
        )
    ]
    sharded, indexed = both(put(tmp_path / "t", members))
    assert labels(sharded) == labels(indexed) and set(labels(sharded)) == {f"x.tar/{i}.png" for i in range(6)}


def test_a_member_whose_name_is_not_utf8_is_quarantined_by_shard_as_by_index(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in [*NAMED, ("bad\udcff.png", picture(1)), ("bad\udcff.json", b'{"label": "c1"}')]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.tar").write_bytes(file.getvalue())
    sharded, indexed = both(tmp_path / "t")
    assert sharded.head.rejected == indexed.head.rejected == {"bad_name": 1}
    assert labels(sharded) == labels(indexed) and sharded.head.ignored["tar_member_not_utf8"] == 1
    shuffled = make_corpus(
        ShardRecipe(
            source=str(tmp_path / "t"),
            destination=str(tmp_path / "s"),
            num_workers=0,
            max_bad_fraction=0.1,
            shuffle=True,
        )
    )
    assert shuffled.head.rejected == {"bad_name": 1}


def test_a_tar_whose_own_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    put(tmp_path / "t", NAMED)
    (tmp_path / "t" / "x.tar").rename(tmp_path / "t" / "x\udcff.tar")
    with pytest.raises(SourceError, match=r"x\\udcff.tar' is not UTF-8"):
        make_corpus(ShardRecipe(source=str(tmp_path / "t"), destination=str(tmp_path / "s"), num_workers=0))
