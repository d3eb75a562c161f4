"""Real dirty input: Debian's openclipart-png (bombs, five colour modes, links, 3 to 1,797 images a class).

Runs where the package is installed, or unpacked below the folder that OPENCLIPART names:
    apt-get download openclipart-png && dpkg -x openclipart-png*.deb DIR && OPENCLIPART=DIR pytest THIS_FILE
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.shard import ShardRecipe, make_corpus

FOLDER = Path(os.environ.get("OPENCLIPART", "/")) / "usr/share/openclipart/png"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="openclipart-png is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("validate", ["header", "decode"])
def test_every_file_is_accounted_for(validate: str, tmp_path: Path) -> None:
    recipe = ShardRecipe(
        source=str(FOLDER),
        destination=str(tmp_path / "c"),
        shard_bytes=20_000_000,
        validate=validate,  # type: ignore[arg-type]
        num_workers=0,
    )
    corpus = make_corpus(recipe)
    walked = [path for path in FOLDER.rglob("*") if not path.is_dir()]
    links = [path for path in walked if path.is_symlink()]
    files = {path.relative_to(FOLDER).as_posix() for path in walked if not path.is_symlink()}
    inside = set(corpus.samples("train")["source"].to_pylist())
    outside = set(corpus.quarantine()["source"].to_pylist())
    assert inside | outside == files and not inside & outside and len(files) == 6900
    assert corpus.head.ignored == {"symlink": len(links)} and len(links) == 1221
    assert corpus.head.noted["alpha"] > 6000 and corpus.head.rejected["bomb"] > 10
