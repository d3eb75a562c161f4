"""`--append` gives what the whole source would give: copies, bad images and class names of both parts together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.corpus.errors import QuarantineError
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.shard import ShardRecipe, make_corpus

from .inputs import class_folders, picture


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
