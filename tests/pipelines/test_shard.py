"""The stage as a whole: real files in, a corpus that foreign readers open out; killed, resumed, fed with bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import shard, store
from pipelines.config import RecipeError, from_dict, load_recipe
from pipelines.corpus.errors import CorpusError, ManifestError, QuarantineError, SourceError
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.corpus.small import write_corpus
from pipelines.identity import deciding_fields, digest_of
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.store.local import TEMPORARY

from .corpus.inputs import animation, class_folders, idx_folder, picture, png_header, tar_folder

ROOT = Path(__file__).parent.parent.parent


def recipe(source: Path, destination: Path, **settings: Any) -> ShardRecipe:
    values = {"source": str(source), "destination": str(destination), "shard_bytes": 3000, "num_workers": 0}
    return from_dict(ShardRecipe, values | settings)


def files_of(base: Path) -> dict[str, bytes]:
    """Everything that a reader may see. Records hold ETags, which on a local disk are times."""
    return {
        path.relative_to(base).as_posix(): path.read_bytes()
        for folder in ("shards", "manifests")
        for path in (base / folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture
def cluster(stack: Any) -> None:
    from pipelines.training.cluster import connect

    connect()


SOURCES = {
    "files": lambda base: class_folders(base, {"cat": 30, "dog": 31, "owl": 5}, ("PNG", "JPEG", "WEBP")),
    "idx": lambda base: idx_folder(base, 90, 30),
    "tars": lambda base: tar_folder(base, 4, 12),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_foreign_readers_find_every_image_and_label(kind: str, tmp_path: Path, cluster: None) -> None:
    """The webdataset package and ray.data.read_webdataset agree with each other and with the manifest."""
    import ray
    import webdataset

    source = SOURCES[kind](tmp_path / "s")
    corpus = make_corpus(recipe(source, tmp_path / "c", splits={"train": 0.8, "val": 0.2}, num_workers=2))
    assert corpus.head.shards > 3
    for split in corpus.splits:
        rows = {row["key"]: row for row in corpus.samples(split).to_pylist()}
        urls = [corpus.shard_uri(i) for i, one in enumerate(corpus.shards) if one.split == split]
        theirs = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)}
        rays = {s["__key__"]: s for s in ray.data.read_webdataset(urls, decoder=None).take_all()}
        assert theirs.keys() == rays.keys() == rows.keys()
        for key, row in rows.items():
            image = next(theirs[key][end] for end in ("png", "jpg", "webp") if end in theirs[key])
            # Ray puts NaN where a sample of the same block has another extension.
            assert [image] == [
                rays[key][end] for end in ("png", "jpg", "webp") if isinstance(rays[key].get(end), bytes)
            ]
            assert theirs[key]["cls"] == rays[key]["cls"] == str(row["label"]).encode()
            described = json.loads(theirs[key]["json"])
            assert described == {name: row[name] for name in ("width", "height", "label")} | {"path": row["source"]}
            if kind == "files":
                assert image == (source / row["source"]).read_bytes()
                assert corpus.class_names[row["label"]] == row["source"].split("/")[0]


def test_with_and_without_ray_and_with_any_number_of_workers_the_corpus_is_the_same(
    tmp_path: Path, cluster: None
) -> None:
    source = SOURCES["files"](tmp_path / "s")
    made = [make_corpus(recipe(source, tmp_path / f"c{n}", num_workers=n)) for n in (0, 1, None)]
    assert len({corpus.digest for corpus in made}) == 1
    first, *others = (files_of(Path(corpus.uri)) for corpus in made)
    assert all(other == first for other in others) and len(first) > 10


KILLED = """
import sys
from pipelines.config import from_dict
from pipelines.shard import ShardRecipe, make_corpus
values = {"source": sys.argv[1], "destination": sys.argv[2], "shard_bytes": 3000, "num_workers": 0}
make_corpus(from_dict(ShardRecipe, values))
"""


@pytest.mark.parametrize("wanted", ["plans/*/plan.json", "plans/*/shards/000003.json", "shards/train-*-000007.tar"])
def test_killed_at_any_moment_nothing_half_written_shows_and_the_same_command_ends_with_the_same_bytes(
    wanted: str, tmp_path: Path
) -> None:
    source = class_folders(tmp_path / "s", {"cat": 120, "dog": 120})
    base = tmp_path / "c"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(base)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(base.glob(wanted)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.read_bytes() for path in base.glob("plans/*/shards/*.json")}
    tars = {path: path.stat().st_mtime_ns for path in base.glob("shards/*.tar")}
    if not (base / "current.json").exists():
        with pytest.raises(ManifestError):
            open_corpus(f"{base}@current")
    corpus = make_corpus(recipe(source, base))
    for path in finished:  # What had its record was kept.
        tar = base / "shards" / json.loads(finished[path])["name"]
        assert tar.stat().st_mtime_ns == tars[tar]
    whole = make_corpus(recipe(source, tmp_path / "whole"))
    assert corpus.digest == whole.digest and files_of(base) == files_of(tmp_path / "whole")
    assert not [path for path in base.rglob("*") if TEMPORARY.fullmatch(path.name) and path.parent != base]


def test_killed_at_random_moments_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"cat": 150, "dog": 150})
    base = tmp_path / "c"
    whole = make_corpus(recipe(source, tmp_path / "whole"))
    seed = time.time_ns() % 10_000
    moments = random.Random(seed)
    print(f"seed {seed}")
    for _ in range(3):
        before = len(list(base.glob("plans/*/shards/*.json")))
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(base)], cwd=ROOT)
        wanted = before + moments.randint(0, 15)  # Of 60 shards; then anywhere between two of them.
        while process.poll() is None and len(list(base.glob("plans/*/shards/*.json"))) <= wanted:
            time.sleep(moments.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (base / "current.json").exists()
    corpus = make_corpus(recipe(source, base))
    assert corpus.digest == whole.digest and files_of(base) == files_of(tmp_path / "whole")


def test_of_two_writers_to_one_destination_the_lease_lets_one_write(tmp_path: Path) -> None:
    from pipelines.corpus.commit import one_writer

    source = class_folders(tmp_path / "s", {"cat": 6, "dog": 6})
    base = tmp_path / "c"
    with one_writer(str(base)), pytest.raises(CorpusError, match=r"is held by process \d+ on .*which writes to it now"):
        make_corpus(recipe(source, base))
    assert not (base / "current.json").exists() and not (base / "plans").exists()
    assert make_corpus(recipe(source, base)).splits == {"train": 12}


def test_of_two_processes_that_write_to_one_destination_one_writes_and_the_other_says_who(tmp_path: Path) -> None:
    source, other = (class_folders(tmp_path / name, {"cat": 60, name: 60}) for name in ("dog", "owl"))
    base = tmp_path / "c"

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(folder), str(base)]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    first = start(source)
    deadline = time.monotonic() + 120
    while not list(base.glob("plans/*/shards/*.json")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # In the middle of its shards, with the lease.
    try:
        before = files_of(base)
        for folder in (source, other):
            late = start(folder)
            _, errors = late.communicate(timeout=120)
            assert late.returncode and f"is held by process {first.pid} on " in errors
            assert "which writes to it now; run the same command again when it has ended" in errors
        assert files_of(base) == before and not (base / "current.json").exists()
    finally:
        first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert open_corpus(f"{base}@current").class_names == ("cat", "dog")
    assert start(other).wait(120) == 0
    assert open_corpus(f"{base}@current").class_names == ("cat", "owl")


def test_a_finished_shard_that_was_damaged_or_lost_is_made_again(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"cat": 30, "dog": 30})
    corpus = make_corpus(recipe(source, tmp_path / "c"))
    before = files_of(tmp_path / "c")
    Path(corpus.shard_uri(0)).write_bytes(b"x")
    Path(corpus.shard_uri(1)).unlink()
    assert make_corpus(recipe(source, tmp_path / "c")) == corpus
    assert files_of(tmp_path / "c") == before


def dirty(base: Path) -> Path:
    """Good images, and one file for each way to be bad or odd."""
    class_folders(base, {"cat": 20, "dog": 20})
    bad = {
        "empty.jpg": b"",
        "cut.jpg": picture(500, (50, 40), "JPEG")[:-30],
        "cut.png": picture(501, (50, 40), "PNG")[:-30],
        "text.jpg": b"not found",
        "bomb.png": png_header(30_000, 30_000),
        "zero.png": png_header(0, 10),
        "moving.png": animation("PNG"),
        "moving.webp": animation("WEBP"),
        "pixels.png": png_header(64, 64),
        "picture.gif": picture(502, kind="GIF"),
        "README.md": b"# a class",
    }
    odd = {
        "cmyk.jpg": picture(503, kind="JPEG", mode="CMYK"),
        "deep.png": picture(504, mode="I;16"),
        "alpha.png": picture(505, mode="RGBA"),
        "named.jpg": picture(506, kind="PNG"),
    }
    for name, data in (bad | odd).items():
        (base / "cat" / name).write_bytes(data)
    (base / "stray.jpg").write_bytes(picture(507, kind="JPEG"))
    (base / "LICENSE").write_bytes(b"free")
    (base / "dog" / "again.png").symlink_to(base / "cat" / "0000.png")
    return base


REASONS = {
    "empty": 1,
    "truncated": 2,
    "not_an_image": 2,
    "bomb": 1,
    "zero_size": 1,
    "animated": 2,
    "corrupt": 1,
    "unsupported_format": 1,
    "missing_label": 1,
}


def test_every_file_is_in_the_corpus_or_in_quarantine_with_its_reason_or_counted(tmp_path: Path) -> None:
    source = dirty(tmp_path / "s")
    corpus = make_corpus(recipe(source, tmp_path / "c", max_bad_fraction=0.5))
    head = corpus.head
    assert head.rejected == dict(sorted(REASONS.items()))
    assert head.noted == {"16bit": 1, "alpha": 1, "cmyk": 1, "renamed": 1}
    assert head.ignored == {"other": 1, "symlink": 1}
    table = corpus.quarantine()
    inside = {row["source"] for row in corpus.samples("train").to_pylist()}
    outside = {row["source"] for row in table.to_pylist()}
    walked = {
        path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file() and not path.is_symlink()
    }
    assert inside | outside | {"LICENSE"} == walked and not inside & outside
    assert Counter(table["reason"].to_pylist()) == REASONS
    for row in table.to_pylist():
        assert row["detail"] and row["class"] == (None if row["source"] == "stray.jpg" else "cat")


def test_header_validation_finds_all_but_what_only_pixels_show(tmp_path: Path) -> None:
    corpus = make_corpus(recipe(dirty(tmp_path / "s"), tmp_path / "c", max_bad_fraction=0.5, validate="header"))
    assert corpus.head.rejected == {name: count for name, count in sorted(REASONS.items()) if name != "corrupt"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_images_stop_the_run_and_nothing_becomes_visible(
    num_workers: int, tmp_path: Path, cluster: None
) -> None:
    with pytest.raises(QuarantineError, match=r"of 56 images are bad .* max_bad_fraction allows 5\.00%") as caught:
        make_corpus(recipe(dirty(tmp_path / "s"), tmp_path / "c", max_bad_fraction=0.05, num_workers=num_workers))
    assert "cat/" in str(caught.value) and "--max-bad-fraction" in str(caught.value)
    with pytest.raises(ManifestError):
        open_corpus(f"{tmp_path / 'c'}@current")


def test_a_corpus_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "x.png").write_bytes(b"nothing")
    with pytest.raises(QuarantineError, match="no image is left of 2"):
        make_corpus(recipe(tmp_path / "s", tmp_path / "c", max_bad_fraction=1.0))


def test_rejected_images_shift_no_other_image_into_another_shard(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"cat": 40, "dog": 40})

    def shard_of(corpus: Corpus) -> dict[str, int]:
        return {row["source"]: row["shard"] for row in corpus.samples("train").to_pylist()}

    before = shard_of(make_corpus(recipe(source, tmp_path / "c1")))
    victim = source / "cat" / "0007.jpg"
    victim.write_bytes(b"\0" * victim.stat().st_size)
    after = shard_of(make_corpus(recipe(source, tmp_path / "c2", max_bad_fraction=0.1)))
    assert after == {path: number for path, number in before.items() if path != "cat/0007.jpg"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_changes_between_plan_and_reading_is_an_error_by_name(
    num_workers: int, tmp_path: Path, cluster: None
) -> None:
    from pipelines.corpus.sources import open_source

    folder = class_folders(tmp_path / "s", {"cat": 10, "dog": 10})
    listed = open_source(str(folder))
    os.utime(folder / "dog" / "0003.jpg", (9, 9))
    with pytest.raises(CorpusError, match=r"dog/0003\.jpg has changed since it was listed"):
        make_corpus(recipe(folder, tmp_path / "c", num_workers=num_workers), listed)
    assert not (tmp_path / "c" / "current.json").exists()
    assert make_corpus(recipe(folder, tmp_path / "c")).splits == {"train": 20}


def test_a_destination_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"cat": 3, "dog": 3})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(store.StoreError, match="cannot write"):
        make_corpus(recipe(source, tmp_path / "file" / "c"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "s"]


def test_a_shard_too_large_for_memory_goes_through_the_disk_and_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = class_folders(tmp_path / "s", {"cat": 20, "dog": 20})
    before = make_corpus(recipe(source, tmp_path / "a"))
    monkeypatch.setattr("pipelines.corpus.build.IN_MEMORY", 0)
    assert make_corpus(recipe(source, tmp_path / "b")).digest == before.digest


def test_a_full_disk_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.corpus.build.IN_MEMORY", 0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10 << 20))
    source = class_folders(tmp_path / "s", {"cat": 3, "dog": 3})
    with pytest.raises(CorpusError, match=r"has 10 MB free, .* set TMPDIR .* run the same command again"):
        make_corpus(recipe(source, tmp_path / "c"))
    assert not (tmp_path / "c" / "current.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("needs root and the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_shows_nothing_and_with_room_the_same_command_goes_on(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = class_folders(tmp_path / "s", {"cat": 80, "dog": 80})
    given = recipe(source, small_disk / "c", shard_bytes=20_000)
    with pytest.raises(store.StoreError, match=r"no space left on the disk of .*/shards/train-.*tar; free some"):
        make_corpus(given)
    with pytest.raises(ManifestError, match="no corpus"):
        open_corpus(f"{small_disk}/c@current")
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert make_corpus(given).digest == make_corpus(recipe(source, tmp_path / "whole", shard_bytes=20_000)).digest
    assert re.search(r"[1-9]\d* of \d+ shards were finished before and are kept", capsys.readouterr().out)
    assert files_of(small_disk / "c") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"shard_byte": 3}, "did you mean 'shard_bytes'"),
        ({"shard_bytes": 0}, "shard_bytes=0 is below 1"),
        ({"max_bad_fraction": 2}, "max_bad_fraction=2"),
        ({"num_workers": -1}, "num_workers=-1 is below 0"),
        ({"splits": {"train": 0.5, "val": 0.4}}, "splits add up to 0.9"),
        ({"splits": {"val": 1.0}}, "has no 'train'"),
        ({"splits": {"train": 1.5, "val": -0.5}}, "train=1.5 is not above 0"),
        ({"splits": {"Train": 1.0}}, "'Train' is no split name"),
        ({"classes": ["a", "a"]}, "names 'a' twice"),
        ({"classes": ["a"]}, "needs two or more"),
        ({"validate": "deep"}, "validate"),
        ({"resize": 256}, "resize"),
        ({"duplicates": "drop"}, "duplicates"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_anything_starts(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(Path("s"), Path("/c"), **settings)


@pytest.mark.parametrize(
    "name", ["shard/class_folders", "shard/webdataset", "demo/shard_fashion", "demo/shard_digits", "smoke/shard"]
)
def test_packaged_recipes_load(name: str) -> None:
    assert load_recipe(ShardRecipe, name).destination


def test_the_demo_recipes_cut_the_demo_corpora_as_they_say(tmp_path: Path) -> None:
    from pipelines.corpus.samples import digits

    values = load_recipe(
        ShardRecipe,
        "demo/shard_digits",
        {"source": str(digits(tmp_path)), "destination": str(tmp_path / "c"), "num_workers": 0},
    )
    corpus = make_corpus(values)
    assert sum(corpus.splits.values()) == 1797 and list(corpus.splits) == ["train", "val", "test"]
    assert 0.18 < corpus.splits["test"] / 1797 < 0.26 and 0.06 < corpus.splits["val"] / 1797 < 0.10
    assert corpus.head.rejected == {} and corpus.class_names == tuple("0123456789")


def test_a_corpus_of_ours_can_be_a_source_again(tmp_path: Path) -> None:
    """Its tars are plain WebDataset tars, with the split in their names and the label in .cls."""
    images = [("train" if i % 4 else "test", "xyz"[i % 3], f"{i}.png", picture(i)) for i in range(60)]
    first = write_corpus(tmp_path / "a", images, shard_samples=10)
    second = make_corpus(recipe(tmp_path / "a" / "shards", tmp_path / "b", classes=list(first.class_names)))
    assert second.splits == first.splits and second.class_names == first.class_names
    for split in first.splits:
        ours = Counter((row["content"], row["label"]) for row in first.samples(split).to_pylist())
        assert ours == Counter((row["content"], row["label"]) for row in second.samples(split).to_pylist())


# 1x1 grey, 67 bytes: written out, because zlib builds compress differently.
DOT = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)


def test_the_same_recipe_and_images_give_the_digests_they_always_gave(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "s" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "s" / name / f"{i}.png").write_bytes(DOT)
    values = recipe(
        tmp_path / "s", Path("/c"), splits={"train": 0.7, "test": 0.3}, shard_bytes=500, validate="header", seed=7
    )
    identity = digest_of(shard.STAGE, shard.VERSION, values, {"source": "0" * 64})
    corpus = make_corpus(dataclasses.replace(values, destination=str(tmp_path / "c")))
    found = (identity[:16], corpus.digest[:16])
    assert found == GOLDEN, "raise VERSION (or SCHEMA, PLAN_VERSION) or restore the result"


GOLDEN = ("8b4ec906fd280696", "851935bcfb588e54")  # Identity of the run, digest of the corpus.


def test_only_recipes_whose_result_has_changed_have_another_version(tmp_path: Path) -> None:
    from pipelines.corpus.sources import open_source

    source = class_folders(tmp_path / "s", {"cat": 2, "dog": 2})
    corpus = make_corpus(recipe(source, tmp_path / "c"))

    def version(given: Path | str, **settings: Any) -> int:
        return shard._version(recipe(Path("s"), tmp_path / "d", **settings), open_source(str(given)))

    assert version(source) == version(corpus.reference, validate="header") == shard.VERSION
    assert version(source, append=True) == version(corpus.reference) == shard.VERSION + 1
    assert version(corpus.reference, validate="header", duplicates="quarantine") == shard.VERSION + 1
    (source / "notes").mkdir()
    (source / "notes" / "x.txt").write_text("no class")
    assert version(source) == shard.VERSION + 1


def test_the_order_of_splits_is_part_of_the_identity_where_it_is_not_the_usual_one() -> None:
    def identity(**splits: float) -> str:
        return digest_of(shard.STAGE, shard.VERSION, recipe(Path("s"), Path("/c"), splits=splits), {"source": "0"})

    assert identity(train=0.8, test=0.2) != identity(test=0.2, train=0.8)
    fields = deciding_fields(recipe(Path("s"), Path("/c"), splits={"train": 0.7, "val": 0.1, "test": 0.1, "b": 0.1}))
    assert fields["splits"] == {"train": 0.7, "val": 0.1, "test": 0.1, "b": 0.1}  # As it always was.
    fields = deciding_fields(recipe(Path("s"), Path("/c"), splits={"test": 0.2, "train": 0.8}))
    assert fields["splits"] == [["test", 0.2], ["train", 0.8]]


@pytest.mark.parametrize("made_with", ["header", "decode"])
def test_images_of_a_corpus_are_decoded_where_the_recipe_says_so(made_with: str, tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"cat": 60, "dog": 60}, ("PNG",))
    data = bytearray(picture(4242))
    place = data.index(b"IDAT") + 10
    data[place : place + 40] = b"\xff" * 40
    (source / "cat" / "broken.png").write_bytes(bytes(data))
    corpus = make_corpus(recipe(source, tmp_path / "c", validate=made_with))
    again = make_corpus(dataclasses.replace(recipe(Path("s"), tmp_path / "d"), source=corpus.reference))
    assert again.splits == {"train": 120} and corpus.splits == {"train": 121 - (made_with == "decode")}
    assert again.head.rejected == ({"corrupt": 1} if made_with == "header" else {})


def test_one_class_and_no_class_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "one", {"cat": 3})
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="one class only"):
        make_corpus(recipe(tmp_path / "one", tmp_path / "c"))
    with pytest.raises(SourceError, match="is empty"):
        make_corpus(recipe(tmp_path / "none", tmp_path / "c"))
    assert not (tmp_path / "c").exists()
