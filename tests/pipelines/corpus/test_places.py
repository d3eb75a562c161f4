"""Where a corpus is written: not into its source, nor beside what killed writers left, whatever the place is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import store
from pipelines.corpus.errors import SourceError
from pipelines.corpus.fetch import Planned, _together
from pipelines.corpus.listing import check_apart
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.sources import open_source
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.verify import open_reference

from .inputs import class_folders


def shard(source: Path, base: Path, **settings: Any) -> Corpus:
    values: dict[str, Any] = {"source": str(source), "destination": str(base), "num_workers": 0}
    return make_corpus(ShardRecipe(**(values | settings)))


def test_a_destination_inside_the_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"a": 5, "b": 5})
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(source)
    for folder in (source / "out", source, tmp_path / "link" / "out"):
        with pytest.raises(SourceError, match="lies in the source"):
            shard(source, folder)
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert shard(source, tmp_path / "s-out").splits == shard(source, source / ".hidden" / "c").splits
    with pytest.raises(SourceError, match="lies in the source"):
        check_apart("s3://bucket/photos/", "s3://bucket/photos/corpus")
    check_apart("s3://bucket/photos", "s3://bucket/photos-corpus")


def test_what_a_killed_writer_left_half_written_goes_with_the_next_run(tmp_path: Path) -> None:
    source, base = class_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "c"
    corpus = shard(source, base)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [base / "shards" / f"x.tar.part-{dead.pid}-1", base / "plans" / f"p.json.part-{dead.pid}-2"]
    alive = base / "shards" / f"x.tar.part-{os.getpid()}-1"
    other = base / "shards" / "holiday.part-2.tar"
    for path in (*left, alive, other):
        path.write_bytes(b"half")
    assert shard(source, base) == corpus
    assert not any(path.exists() for path in left) and alive.exists() and other.exists()
    shown = {info.uri for info in store.list_objects(str(base / "shards"))}
    assert str(other) in shown and str(alive) not in shown


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "set@0123456789ab", {"a": 5, "b": 5})
    assert open_source(str(source)).kind == "files"
    corpus = shard(source, tmp_path / "me@host")
    assert open_reference(str(tmp_path / "me@host")) == corpus == open_reference(corpus.reference)


def test_images_from_all_over_many_tars_are_held_together_up_to_a_limit() -> None:
    rows = [Planned(str(i), "u", 0, size, "", 0) for i, size in enumerate((5, 5, 3, 20, 1, 1))]
    assert [[row.size for row in some] for some in _together(rows, 10)] == [[5, 5], [3], [20], [1, 1]]
    assert list(_together([], 10)) == []
