from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.workflow import stages
from tests.pipelines.workflow import brew


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store and a state folder on disk, a working folder, and one more stage: brew."""
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "store"))
    monkeypatch.setenv("VIT_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pipelines.brew", brew)
    monkeypatch.setitem(stages.STAGES, "brew", "water -> tea")  # type: ignore[arg-type]
    return tmp_path


@pytest.fixture
def write(house: Path) -> Callable[[str, str], str]:
    def write_file(name: str, text: str) -> str:
        path = house / name
        path.write_text(text)
        return str(path)

    return write_file


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 2 x 60 pictures, 16 px: light ones and dark ones."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for label, base in {"dark": 40, "light": 200}.items():
        (folder / label).mkdir()
        for number in range(60):
            pixels = np.clip(random.normal(base, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number:03d}.png")
    return folder
