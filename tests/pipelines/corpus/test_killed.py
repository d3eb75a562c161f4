"""kill -9 in the middle of what grows a corpus: the same command ends it, with the same files."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.corpus.manifest import open_corpus
from pipelines.shard import ShardRecipe, make_corpus

from .inputs import class_folders, picture, tar_bytes

ROOT = Path(__file__).parents[3]

# A command in a process of its own, which ends itself before its Nth write to the store, or after it.
COMMAND = """
import os, signal, sys
import pipelines.store.local as local
what, place, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
count = 0

def counted(inner):
    def call(*args, **options):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        done = inner(*args, **options)
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return call

local.write, local.copy = counted(local.write), counted(local.copy)
if what == "append":
    from pipelines.shard import ShardRecipe, make_corpus
    recipe = ShardRecipe(source=f"{place}/s", destination=f"{place}/c", append=True, shard_bytes=3000, num_workers=0)
    make_corpus(recipe)
elif what == "exclude":
    from pipelines.corpus.command import main
    main(["exclude", f"{place}/c", f"{place}/list.txt"], lambda: None)
elif what == "subset":
    from pipelines.corpus.manifest import open_corpus
    from pipelines.subset import SubsetRecipe, make_subset
    corpus = open_corpus(f"{place}/c@current")
    recipe = SubsetRecipe(
        corpus=corpus.reference, destination=f"{place}/o", fraction=0.3, materialise="always", num_workers=0
    )
    make_subset(recipe, corpus)
else:
    from pipelines.index import IndexRecipe, adopt_tars
    adopt_tars(IndexRecipe(source=f"{place}/t", destination=f"{place}/o", num_workers=0))
print("writes", count)
"""


def run(what: str, place: Path, last: int = -1) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", COMMAND, what, str(place), str(last)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)


def world(place: Path) -> Path:
    source = class_folders(place / "s", {"a": 8, "b": 8}, kinds=("PNG",))
    make_corpus(ShardRecipe(source=str(source), destination=str(place / "c"), shard_bytes=3000, num_workers=0))
    for i in range(6):
        (source / "b" / f"new{i}.png").write_bytes(picture(8000 + i))
    (place / "list.txt").write_text("a/0000.png\nb/0003.png\n")
    (place / "t").mkdir()
    for tar in range(2):
        pairs = [((f"{i}.png", picture(10 * tar + i)), (f"{i}.cls", b"%d" % (i % 2))) for i in range(6)]
        (place / "t" / f"{tar}.tar").write_bytes(tar_bytes([member for pair in pairs for member in pair]))
    return place


def files(place: Path) -> set[str]:
    return {
        path.relative_to(place).as_posix()
        for path in place.rglob("*")
        if path.is_file() and "lease.json" not in path.name
    }


@pytest.mark.parametrize("what", ["append", "exclude", "subset", "index"])
def test_what_is_killed_ends_as_if_it_had_not_been(what: str, tmp_path: Path) -> None:
    calm, killed = world(tmp_path / "calm"), tmp_path / "killed"
    shutil.copytree(calm, killed)  # With the times of change, which are in the plan.
    done = run(what, calm)
    assert done.returncode == 0, done.stderr
    writes = int(done.stdout.split("writes ")[1])
    for last in (writes // 3, 2 * writes // 3, writes - 3):  # Each begins where the one before was killed.
        run(what, killed, max(last, 1))
    first = run(what, killed, 4)
    assert first.returncode in (0, -signal.SIGKILL)
    done = run(what, killed)
    assert done.returncode == 0, done.stderr
    name = "c" if what in ("append", "exclude") else "o"
    one, other = open_corpus(f"{calm / name}@current"), open_corpus(f"{killed / name}@current")
    assert one.digest == other.digest and one.splits == other.splits
    for column in ("key", "reason"):
        assert one.quarantine()[column] == other.quarantine()[column]
    for split in one.splits:
        assert one.samples(split).equals(other.samples(split))
    assert {path for path in files(killed) if "accounts/" not in path} == files(calm)
