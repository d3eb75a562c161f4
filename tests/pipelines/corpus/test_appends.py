"""`--append` gives what the whole source would give: copies, bad images and class names of both parts together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import from_dict
from pipelines.corpus.errors import CorpusError, QuarantineError
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.index import IndexRecipe, adopt_tars
from pipelines.shard import ShardRecipe, make_corpus

from .inputs import class_folders, picture, tar_bytes


def shard(source: Path, base: Path, **settings: Any) -> Corpus:
    values: dict[str, Any] = {"source": str(source), "destination": str(base), "shard_bytes": 30_000, "num_workers": 0}
    return make_corpus(ShardRecipe(**(values | settings)))


# Bad images ---------------------------------------------------------------------------------------------------------


def with_bad(folder: Path) -> Path:
    class_folders(folder, {"cat": 150, "dog": 150})
    for name in ("bad0.jpg", "bad1.jpg"):
        (folder / "cat" / name).write_bytes(b"no image")
    (folder / "stray.png").write_bytes(picture(7000))
    return folder


def test_images_that_were_bad_before_do_not_count_again(tmp_path: Path) -> None:
    source, base = with_bad(tmp_path / "s"), tmp_path / "c"
    parent = shard(source, base)
    assert parent.head.rejected == {"missing_label": 1, "not_an_image": 2}
    assert shard(source, base, append=True) == parent == open_corpus(f"{base}@current")
    for i in range(20):
        (source / "dog" / f"new{i}.png").write_bytes(picture(9000 + i))
    grown = shard(source, base, append=True)
    assert grown.splits == {"train": 320} and grown.head.rejected == parent.head.rejected
    (source / "cat" / "bad0.jpg").write_bytes(picture(8000))  # Repaired: now it comes.
    mended = shard(source, base, append=True)
    assert mended.splits == {"train": 321} and mended.head.rejected == {"missing_label": 1, "not_an_image": 1}


def test_new_images_that_are_bad_count_among_the_new_ones(tmp_path: Path) -> None:
    source, base = with_bad(tmp_path / "s"), tmp_path / "c"
    parent = shard(source, base)
    for i in range(20):
        (source / "dog" / f"new{i}.png").write_bytes(picture(9000 + i))
    (source / "dog" / "new.png").write_bytes(b"")
    with pytest.raises(QuarantineError, match=r"1 of 21 images are bad .*\n.*dog/new.png: empty"):
        shard(source, base, append=True)
    assert shard(source, base, append=True, max_bad_fraction=0.05).head.rejected["empty"] == 1
    (source / "new.png").write_bytes(picture(9100))
    with pytest.raises(QuarantineError, match=r"1 of 5 images are bad .*\n.*new.png: missing_label"):
        shard(source, base, append=True)
    assert parent.head.rejected == {"missing_label": 1, "not_an_image": 2}


# Copies -------------------------------------------------------------------------------------------------------------


def with_leak(folder: Path) -> Path:
    """Four test images are copied into train, and one of them twice."""
    for i in range(4):
        data = (folder / "test" / "cat" / f"{i:04d}.{'jpg' if i % 2 else 'png'}").read_bytes()
        (folder / "train" / "cat" / f"leak{i}.png").write_bytes(data)
    (folder / "train" / "dog" / "twice.png").write_bytes(data)
    return folder


FOUR = {"test/cat": 5, "test/dog": 5, "train/cat": 5, "train/dog": 5}


def test_copies_between_old_and_new_images_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, base = class_folders(tmp_path / "s", FOUR), tmp_path / "c"
    assert shard(source, base).head.duplicates == {}
    with_leak(source)
    grown = shard(source, base, append=True)
    assert "4 images of the new version occur in more than one split" in caplog.text
    whole = shard(source, tmp_path / "whole")
    assert grown.head.duplicates == whole.head.duplicates == {"images": 5, "across_splits": 4, "across_classes": 1}
    assert grown.splits == whole.splits == {"train": 15, "test": 10}


@pytest.mark.parametrize("before", ["keep", "quarantine"])
def test_copies_of_old_images_are_put_into_quarantine_where_the_recipe_says_so(before: str, tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", FOUR), tmp_path / "c"
    own = (source / "train" / "dog" / "0000.png").read_bytes()
    (source / "train" / "dog" / "own.png").write_bytes(own)
    shard(source, base, duplicates=before)
    with_leak(source)
    grown = shard(source, base, append=True, duplicates="quarantine")
    whole = shard(source, tmp_path / "whole", duplicates="quarantine")
    assert grown.splits == whole.splits == {"train": 10, "test": 10}
    assert grown.head.rejected == whole.head.rejected == {"duplicate": 6}
    assert grown.head.duplicates == whole.head.duplicates
    assert sorted(grown.quarantine()["source"].to_pylist()) == sorted(whole.quarantine()["source"].to_pylist())
    again = shard(source, base, append=True, duplicates="quarantine")
    assert again.digest == grown.digest and again.head.rejected == grown.head.rejected


def test_an_old_training_image_makes_way_for_its_copy_in_the_new_test_set(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"train/cat": 5, "train/dog": 5}), tmp_path / "c"
    shard(source, base)
    class_folders(source, {"test/cat": 1, "test/dog": 1})
    (source / "test" / "cat" / "0000.png").write_bytes((source / "train" / "cat" / "0002.png").read_bytes())
    grown = shard(source, base, append=True, duplicates="quarantine")
    assert grown.splits == {"train": 9, "test": 2} and grown.quarantine()["source"].to_pylist() == [
        "train/cat/0002.png"
    ]
    assert "test/cat/0000.png" in grown.quarantine()["detail"][0].as_py()
    assert "train/cat/0002.png" not in grown.samples("train")["source"].to_pylist()


# Classes with numbers for names -------------------------------------------------------------------------------------


def listed(folder: Path, *labels: str) -> Path:
    folder.mkdir(exist_ok=True)
    for i, _ in enumerate(labels):
        (folder / f"{folder.name}{i}.png").write_bytes(picture(700 + i))
    rows = "".join(f"{folder.name}{i}.png,{label}\n" for i, label in enumerate(labels))
    (folder / "list.csv").write_text(f"uri,label\n{rows}")
    return folder / "list.csv"


def test_a_number_means_the_class_of_that_name(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {str(i): 2 for i in range(12)}), tmp_path / "c"
    assert shard(source, base).class_names[2] == "10"
    grown = shard(listed(tmp_path / "n", "2", "11"), base, append=True)
    found = {row["source"]: grown.class_names[row["label"]] for row in grown.samples("train").to_pylist()}
    assert (found["n0.png"], found["n1.png"]) == ("2", "11")
    with pytest.raises(CorpusError, match=r"label 12 is no class of .* in which numbers are names such as '0'"):
        shard(listed(tmp_path / "m", "2", "12"), base, append=True)
    wider = shard(listed(tmp_path / "m", "2", "12"), tmp_path / "c", append=True, classes=(*grown.class_names, "12"))
    assert wider.class_names == (*grown.class_names, "12")


def test_a_number_stays_a_number_where_classes_have_names_or_are_their_own_numbers(tmp_path: Path) -> None:
    for name, classes in (("c", ("cat", "dog", "owl")), ("d", ("0", "1", "2"))):
        corpus = shard(class_folders(tmp_path / f"s{name}", dict.fromkeys(classes, 2)), tmp_path / name)
        grown = shard(listed(tmp_path / f"n{name}", "2"), tmp_path / name, append=True)
        (row,) = (row for row in grown.samples("train").to_pylist() if row["source"] == f"n{name}0.png")
        assert row["label"] == 2 and grown.class_names == corpus.class_names == classes


def test_padded_numbers_are_not_guessed(tmp_path: Path) -> None:
    base = tmp_path / "c"
    shard(class_folders(tmp_path / "s", {f"{i:03d}": 2 for i in range(1, 5)}), base)
    try:
        grown = shard(listed(tmp_path / "n", "002"), base, append=True)
    except CorpusError as error:
        assert "label 2 is no class of" in str(error)
    else:  # Where lists keep the zeros, the name is clear.
        (row,) = (row for row in grown.samples("train").to_pylist() if row["source"] == "n0.png")
        assert grown.class_names[row["label"]] == "002"


# Tars that were adopted -----------------------------------------------------------------------------------------------


def test_tars_that_are_in_an_indexed_corpus_are_not_appended_to_it_again(tmp_path: Path) -> None:
    source, base = tmp_path / "t", tmp_path / "c"
    source.mkdir()

    def write(name: str, first: int, count: int = 20) -> None:
        members = [((f"{i}.cls", b"%d" % (i % 2)), (f"{i}.png", picture(first + i))) for i in range(count)]
        (source / name).write_bytes(tar_bytes([member for pair in members for member in pair]))

    write("x.tar", 0)
    values = {"source": str(source), "destination": str(base), "num_workers": 0}
    adopted = adopt_tars(from_dict(IndexRecipe, values)).corpus
    assert shard(source, base, append=True) == adopted
    write("y.tar", 100, 4)
    grown = shard(source, base, append=True)
    assert grown.splits == {"train": 24} and grown.head.ignored == {"in_parent": 20} and grown.head.duplicates == {}
    write("x.tar", 500)
    with pytest.raises(CorpusError, match=r"20 images have changed since .*x.tar/0.png"):
        shard(source, base, append=True)
