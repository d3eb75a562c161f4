"""What was withdrawn stays out when the corpus is made again; copies of it are named or go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import from_dict
from pipelines.corpus.command import main
from pipelines.corpus.commit import point_to_finished
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.grow import exclude, versions
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.corpus.withdrawn import look_at
from pipelines.identity import StageResult
from pipelines.index import IndexRecipe, adopt_tars
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.subset import SubsetRecipe, make_subset

from .inputs import class_folders, picture, tar_bytes


def shard(source: Path, base: Path, **settings: Any) -> Corpus:
    values: dict[str, Any] = {"source": str(source), "destination": str(base), "num_workers": 0}
    return make_corpus(ShardRecipe(**(values | settings)))


def paths(corpus: Corpus, split: str = "train") -> list[str]:
    return list(corpus.samples(split)["source"].to_pylist())


def current(base: Path) -> Corpus:
    return open_corpus(f"{base}@current")


def test_a_corpus_that_is_sharded_again_keeps_its_withdrawn_images_out(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "c"
    whole = shard(source, base)
    without = exclude(f"{base}@current", ["a/0000.png"], "takedown.txt")
    again = shard(source, base)
    assert again == current(base) and again.digest == without.digest  # The same source: nothing has changed.
    (source / "b" / "new.png").write_bytes(picture(99))
    assert sum(shard(source, base, append=True).splits.values()) == 10
    grown = shard(source, base)
    assert sum(grown.splits.values()) == 10 and "a/0000.png" not in paths(grown) and "b/new.png" in paths(grown)
    assert grown.head.rejected == {"withdrawn": 1}
    assert grown.quarantine()["detail"].to_pylist() == ["listed in takedown.txt"]
    (source / "a" / "0000.png").unlink()
    assert shard(source, base).head.rejected == {"withdrawn": 1}  # Remembered, though it is not there.
    (source / "a" / "0000.png").write_bytes(picture(0))
    assert "a/0000.png" not in paths(shard(source, base))
    back = shard(source, base, restore=True)
    assert "a/0000.png" in paths(back) and back.head.rejected == {} and current(base) == back
    assert shard(source, tmp_path / "other").digest == back.digest != whole.digest
    with pytest.raises(ValueError, match="restore has no effect with append"):
        ShardRecipe(source="s", destination="d", append=True, restore=True)


def test_a_withdrawal_is_an_input_of_the_run_and_one_that_comes_in_between_is_not_lost(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "c"
    assert look_at(str(base)).inputs == {}
    first = shard(source, base)
    seen = look_at(str(base))
    assert seen.inputs == {} and seen.version == first
    exclude(f"{base}@current", ["a/0000.png"])
    assert look_at(str(base)).inputs.keys() == {"withdrawn"}
    finished = StageResult("shard", first.reference, "0" * 64, reused=True)
    with pytest.raises(CorpusError, match="was moved by another writer"):
        point_to_finished(finished, seen.current)
    (source / "b" / "new.png").write_bytes(picture(99))
    values: dict[str, Any] = {"source": str(source), "destination": str(base), "num_workers": 0}
    with pytest.raises(CorpusError, match="by another writer"):
        make_corpus(ShardRecipe(**values), found=seen)
    with pytest.raises(CorpusError, match="by another writer"):
        make_corpus(ShardRecipe(**values, append=True), found=seen)
    assert "a/0000.png" not in paths(current(base))


def test_tars_that_are_indexed_again_and_a_subset_made_again_keep_them_out_too(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()

    def write(name: str, first: int) -> None:
        members = [((f"{i}.cls", b"%d" % (i % 2)), (f"{i}.png", picture(first + i))) for i in range(8)]
        (tmp_path / "t" / name).write_bytes(tar_bytes([member for pair in members for member in pair]))

    def index() -> Corpus:
        values = {"source": str(tmp_path / "t"), "destination": str(tmp_path / "i"), "num_workers": 0}
        return adopt_tars(from_dict(IndexRecipe, values)).corpus

    write("x.tar", 0)
    index()
    exclude(f"{tmp_path / 'i'}@current", ["x.tar/3.png"])
    write("y.tar", 50)
    again = index()
    assert again.splits == {"train": 15} and "x.tar/3.png" not in paths(again) and current(tmp_path / "i") == again

    values: dict[str, Any] = {"destination": str(tmp_path / "few"), "num_workers": 0, "per_class": 6}
    for kind in ("never", "always"):
        recipe = SubsetRecipe(corpus=again.reference, materialise=kind, **values)
        few = make_subset(recipe, again)
        one = paths(few)[0]
        exclude(f"{tmp_path / 'few'}@current", [one])
        assert one not in paths(make_subset(recipe, again))


def test_copies_of_a_withdrawn_image_are_named_and_go_with_it_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, base = class_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "c"
    for name in ("b/copy.png", "a/other.png"):
        (source / name).write_bytes((source / "a" / "0000.png").read_bytes())
    shard(source, base)
    one = exclude(f"{base}@current", ["a/0000.png"])
    assert one.splits == {"train": 11} and "2 images of the same bytes" in caplog.text and "--copies" in caplog.text
    two = exclude(f"{base}@current", ["a/0000.png"], copies=True)
    assert two.splits == {"train": 9} and two.head.rejected == {"withdrawn": 3}
    assert "as a/0000.png" in "".join(two.quarantine()["detail"].to_pylist())


def test_a_listed_image_that_was_left_out_as_a_copy_is_withdrawn(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "c"
    (source / "b" / "copy.png").write_bytes((source / "a" / "0000.png").read_bytes())
    corpus = shard(source, base, duplicates="quarantine")
    (left,) = [row["source"] for row in corpus.quarantine().to_pylist()]
    gone = exclude(f"{base}@current", [left], "list", copies=True)
    assert gone.splits == {"train": 9} and gone.head.rejected == {"withdrawn": 2}
    assert not {"a/0000.png", "b/copy.png"} & set(paths(gone))


def test_an_image_in_quarantine_can_be_withdrawn_before_it_ever_comes(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "c"
    (source / "a" / "late.png").write_bytes(b"")
    shard(source, base, max_bad_fraction=0.5)
    assert exclude(f"{base}@current", ["a/late.png"]).head.rejected == {"withdrawn": 1}
    (source / "a" / "late.png").write_bytes(picture(77))
    (source / "a" / "new.png").write_bytes(picture(78))
    for settings in ({"append": True}, {}):
        made = shard(source, base, **settings)
        assert made.splits == {"train": 11} and "a/late.png" not in paths(made)
        assert made.head.rejected == {"withdrawn": 1}


def test_versions_are_those_that_were_current_however_many_they_are(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "c"
    made = [shard(source, base)]
    (source / "a" / "new.png").write_bytes(picture(91))
    made.append(shard(source, base, append=True))
    made.append(exclude(f"{base}@current", ["a/0000.png"]))
    (source / "a" / "newer.png").write_bytes(picture(92))
    made.append(shard(source, base, append=True))
    assert [one.digest for one in versions(str(base))] == [one.digest for one in made]

    head = json.loads((base / "manifests" / made[-1].digest / "head.json").read_text())
    parent = made[-1].digest
    for number in range(1100):  # Copies of the head, each with the one before as its parent.
        digest = f"{number + 1:064x}"
        (base / "manifests" / digest).mkdir()
        (base / "manifests" / digest / "head.json").write_text(json.dumps(head | {"digest": digest, "parent": parent}))
        parent = digest
    assert [one.digest for one in versions(str(base))][-1] == parent


@pytest.mark.parametrize("name", ["mistyped", "photos@0123456789ab"])
def test_withdrawing_from_what_is_no_corpus_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    shard(class_folders(tmp_path / "s", {"a": 2, "b": 2}), tmp_path / "photos")
    (tmp_path / "list.txt").write_text("a/0000.png\n")
    with pytest.raises(CorpusError, match="no corpus"):
        main(["exclude", str(tmp_path / name), str(tmp_path / "list.txt")], lambda: None)
    assert {path.name for path in tmp_path.iterdir()} == {"s", "photos", "list.txt"}


def test_a_takedown_list_may_begin_with_a_byte_order_mark_and_must_be_utf8(tmp_path: Path) -> None:
    corpus = shard(class_folders(tmp_path / "s", {"a": 2, "b": 2}), tmp_path / "photos")
    first, second = corpus.samples("train")["source"].to_pylist()[:2]
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\xef\xbb\xbf" + first.encode() + b"\r\n" + second.encode())
    assert main(["exclude", str(tmp_path / "photos"), str(listed)], lambda: None) == 0
    assert open_corpus(f"{corpus.uri}@current").head.rejected == {"withdrawn": 2}
    listed.write_bytes(b"a/1.png\ncaf\xe9.png\n")
    with pytest.raises(CorpusError, match=r"list.txt is not UTF-8 \(byte 11\)"):
        main(["exclude", str(tmp_path / "photos"), str(listed)], lambda: None)


def copied(folder: Path, duplicates: Any) -> Corpus:
    source = class_folders(folder / "s", {"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2})
    for number, name in enumerate(("train/b/copy.png", "test/a/leak.png")):
        (source / name).write_bytes((source / "train" / "a" / f"000{2 * number}.png").read_bytes())
    return shard(source, folder / "c", duplicates=duplicates)


def test_copies_are_counted_anew_when_images_are_withdrawn(tmp_path: Path) -> None:
    corpus = copied(tmp_path, "keep")
    assert corpus.head.duplicates == {"images": 2, "across_splits": 1, "across_classes": 1}
    other = exclude(f"{corpus.uri}@current", ["train/a/0001.jpg"])
    assert other.head.duplicates == corpus.head.duplicates
    assert exclude(f"{corpus.uri}@current", ["train/a/0002.png"]).head.duplicates == {"images": 1, "across_classes": 1}


def test_a_withdrawn_picture_that_comes_under_another_name_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = copied(tmp_path, "quarantine")
    put_away = {row["source"] for row in corpus.quarantine().to_pylist()}
    (hidden,) = put_away & {"train/a/0000.png", "train/b/copy.png"}
    (shown,) = {"train/a/0000.png", "train/b/copy.png"} - put_away
    made = exclude(f"{corpus.uri}@current", [hidden])
    assert f"1 images of the same bytes as withdrawn ones go on coming, such as {shown}" in caplog.text
    assert made.splits == corpus.splits and made.head.rejected == {"duplicate": 1, "withdrawn": 1}
    caplog.clear()
    made = exclude(f"{corpus.uri}@current", [hidden, shown])
    assert "go on coming" not in caplog.text and made.head.rejected == {"duplicate": 1, "withdrawn": 2}
    assert made.splits["train"] == corpus.splits["train"] - 1
    assert open_corpus(f"{corpus.uri}@current").head == made.head
