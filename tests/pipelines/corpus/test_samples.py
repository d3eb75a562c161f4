from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.corpus import samples
from pipelines.corpus.sources import open_source

from .inputs import idx_folder


def test_digits_are_the_1797_of_scikit_learn_and_the_same_source_each_time(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    from vit_model.preprocess import decode_image

    folder = samples.digits(tmp_path)
    source = open_source(str(folder))
    entries = source.entries()
    assert len(entries) == 1797 and sorted(set(entries.label)) == list("0123456789")
    data = load_digits()
    for number in (0, 700, 1796):
        pixels = decode_image((folder / str(data.target[number]) / f"{number:04d}.png").read_bytes(), 1)[0].numpy()
        assert np.array_equal(pixels, np.round(data.images[number] * 255 / 16))
    shutil.rmtree(folder)
    assert open_source(str(samples.digits(tmp_path))).digest == source.digest


def test_an_installed_package_is_used_and_the_classes_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "INSTALLED", idx_folder(tmp_path / "usr" / "share" / "datasets" / "fashion-mnist"))
    folder, told = samples.fashion_mnist(tmp_path)
    assert "dataset-fashion-mnist" in told and folder.parent == tmp_path
    source = open_source(str(folder))
    assert source.entries().class_names == samples.FASHION_CLASSES
    shutil.rmtree(folder)
    assert open_source(str(samples.fashion_mnist(tmp_path)[0])).digest == source.digest


def test_without_apt_the_photos_of_scikit_learn_stand_in_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "INSTALLED", tmp_path / "nothing")
    monkeypatch.setenv("PATH", "")
    folder, told = samples.fashion_mnist(tmp_path)
    assert "no apt" in told and "stand-in" in told and "scikit-learn" in told
    source = open_source(str(folder))
    entries = source.entries()
    assert [entries.split.count(name) for name in ("train", "test")] == [6000, 1000]
    assert entries.class_names is not None and len(entries.class_names) == 10 == len(set(entries.label))
    shutil.rmtree(folder)
    assert open_source(str(samples.stand_in(tmp_path))).digest == source.digest


def test_a_package_that_apt_does_not_know_is_reported_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("apt-get"):
        pytest.skip("no apt on this machine")
    monkeypatch.setattr(samples, "PACKAGE", "dataset-that-nobody-made")
    monkeypatch.setattr("os.geteuid", lambda: 1000)  # So that no package list is fetched.
    problem = samples._from_package(tmp_path / "target")
    assert "apt-get download" in problem and "dataset-that-nobody-made" in problem
    assert not (tmp_path / "target").exists()
