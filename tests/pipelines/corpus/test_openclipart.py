"""Real dirty input: Debian's openclipart-png (bombs, five colour modes, links, 3 to 1,797 images a class).

Whole where it is installed, or unpacked below the folder that OPENCLIPART names; else fetched with apt-get (131 MB) and
unpacked without installing it, a few classes of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.config import from_dict
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.shard import ShardRecipe, make_corpus

PLACE = Path("usr/share/openclipart/png")
CLASSES = ("buttons", "education", "special", "transportation")  # 3 to 170 images, a bomb, more links than files.
SECONDS = 120


def _installed() -> Path | None:
    roots = [Path(root) for root in (os.environ.get("OPENCLIPART"), "/") if root]
    return next((root / PLACE for root in roots if (root / PLACE).is_dir()), None)


whole = pytest.mark.skipif(_installed() is None, reason="openclipart-png is not installed; OPENCLIPART=FOLDER names it")


@pytest.fixture(scope="module")
def openclipart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if (found := _installed()) is not None:
        yield found
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        pytest.skip("openclipart-png is not installed, and there is no apt to fetch it")
    folder = tmp_path_factory.mktemp("openclipart")
    try:
        subprocess.run(
            ["apt-get", "download", "openclipart-png"], cwd=folder, check=True, capture_output=True, timeout=SECONDS
        )
        package = next(folder.glob("*.deb"))
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True, capture_output=True, timeout=SECONDS)
    except (subprocess.SubprocessError, StopIteration) as error:
        pytest.skip(f"openclipart-png cannot be fetched here: {error}")
    yield folder / PLACE
    shutil.rmtree(folder)


def account(source: Path, destination: Path, validate: str) -> tuple[Corpus, set[str], int]:
    """Shard it, and hold the result against a walk of the files: (corpus, files, links)."""
    values = {"source": str(source), "destination": str(destination), "shard_bytes": 20_000_000, "num_workers": 0}
    corpus = make_corpus(from_dict(ShardRecipe, values | {"validate": validate, "max_bad_fraction": 0.05}))
    return compare(corpus, source)


def compare(corpus: Corpus, source: Path) -> tuple[Corpus, set[str], int]:
    walked = [path for path in source.rglob("*") if not path.is_dir()]
    links = sum(path.is_symlink() for path in walked)
    files = {path.relative_to(source).as_posix() for path in walked if not path.is_symlink()}
    inside = set(corpus.samples("train")["source"].to_pylist())
    outside = set(corpus.quarantine()["source"].to_pylist())
    assert inside | outside == files and not inside & outside
    assert corpus.head.samples + sum(corpus.head.rejected.values()) == len(files)
    assert corpus.head.ignored.get("symlink", 0) + corpus.head.ignored.get("broken_symlink", 0) == links
    return corpus, files, links


def test_every_file_of_a_few_classes_is_accounted_for(openclipart: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        shutil.copytree(openclipart / name, tmp_path / "s" / name, symlinks=True)
    corpus, files, links = account(tmp_path / "s", tmp_path / "c", "decode")
    assert set(corpus.class_names) == set(CLASSES) and (len(files), links) == (321, 330)
    assert corpus.head.noted["alpha"] > 100 and corpus.head.rejected == {"bomb": 1}


@whole
@pytest.mark.timeout(900)
def test_every_file_of_the_whole_is_accounted_for(openclipart: Path, tmp_path: Path) -> None:
    corpus, files, links = account(openclipart, tmp_path / "c", "header")
    check_whole(corpus, files, links)


@whole
@pytest.mark.stack
@pytest.mark.timeout(900)
@pytest.mark.skipif("OPENCLIPART" not in os.environ, reason="two minutes: OPENCLIPART=FOLDER asks for it")
def test_the_command_accounts_for_every_file_of_the_whole(stack: Any, openclipart: Path, tmp_path: Path) -> None:
    """`vit shard` on Ray to the object store, every pixel decoded."""
    recipe = tmp_path / "openclipart.yaml"
    recipe.write_text(
        f"source: {openclipart}\ndestination: openclipart\nshard_bytes: 20000000\nmax_bad_fraction: 0.05\n"
    )
    assert main(["shard", str(recipe)]) == 0
    check_whole(*compare(open_corpus("openclipart@current"), openclipart))


def check_whole(corpus: Corpus, files: set[str], links: int) -> None:
    assert (len(files), links) == (6900, 1221)
    assert corpus.head.noted["alpha"] > 6000 and corpus.head.rejected["bomb"] > 10
    sys.stdout.write(f"{corpus.head.samples} of {len(files)}; {corpus.head.rejected} {corpus.head.noted}\n")
